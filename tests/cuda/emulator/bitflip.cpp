// The sweep over single-bit flips under emulation, with a C face for ctypes.
#include "emulator.hpp"

inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }

#include "bitflip.cu"

extern "C" void emulate_bitflip(const u8* q, const u8* k, const u8* v, const int* segments,
                                const Real* grad, const double* e0, const double* e1,
                                const double* e_null, Real* credit_q, Real* credit_k,
                                std::size_t shared_bytes, std::size_t scratch_bytes, u32 streams,
                                u32 routes, u32 T, u32 max_length, u32 min_length,
                                u32 unmatched_self, u32 flip_values, u32 grid) {
  std::vector<u8> scratch(scratch_bytes * grid + 16, 0x5a);
  u8* aligned = (u8*)(((std::uintptr_t)scratch.data() + 15) & ~(std::uintptr_t)15);
  emu::launch({grid, 1, 1}, THREADS, shared_bytes, [&] {
    bitflip(q, k, v, segments, grad, e0, e1, e_null, credit_q, credit_k, aligned, scratch_bytes,
            streams, routes, T, max_length, min_length, unmatched_self, flip_values);
  });
}
