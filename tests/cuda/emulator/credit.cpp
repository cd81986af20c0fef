// Retrieval and the counterfactual backward pass under emulation, with a C face for ctypes.
#include "emulator.hpp"
#include "format.cuh"
#include "credit.cu"

namespace {
constexpr std::size_t TILES = (1 + M) * sizeof(Tile);
unsigned ceil_div(unsigned a, unsigned b) { return (a + b - 1) / b; }
}  // namespace

extern "C" void emulate_retrieve(const Scalar* v, const int* position, const EScalar* e0,
                                 const EScalar* e1, const EScalar* e_null, Scalar* y, unsigned B,
                                 unsigned T, unsigned R, unsigned unmatched) {
  emu::launch({ceil_div(T, 32), ceil_div(R, 32), B}, 256, TILES,
              [&] { retrieve(v, position, e0, e1, e_null, y, T, R, unmatched); });
}

extern "C" void emulate_pack(const Scalar* x, u8* symbols, unsigned B, unsigned T, unsigned R) {
  emu::launch({ceil_div(T, 32), ceil_div(R, 32), B}, 256, TILES, [&] { pack(x, symbols, T, R); });
}

extern "C" void emulate_credit(const Scalar* grad, const Scalar* q, const Scalar* k,
                               const Scalar* v, const EScalar* e0, const EScalar* e1,
                               const int* position, const int* flipped, const int* credit_from,
                               Scalar* dq, Scalar* dk, Scalar* dv, float* partials,
                               const float* scale, unsigned B, unsigned T, unsigned R,
                               unsigned chunk, unsigned slice, unsigned unmatched, unsigned soft,
                               unsigned key_from, float temperature) {
  for (unsigned first = 0; first < R; first += chunk) {
    const unsigned here = R - first < chunk ? R - first : chunk;
    std::vector<Sum> sums((std::size_t)B * T * here * 2 * M + 4);
    Sum* aligned = (Sum*)(((std::uintptr_t)sums.data() + 15) & ~(std::uintptr_t)15);
    emu::launch({ceil_div(T, slice), ceil_div(here, 32), B}, 256, TILES, [&] {
      credit(grad, q, v, e0, e1, position, flipped, dq, aligned, partials, scale, T, R, first, here,
             slice, unmatched, soft, temperature);
    });
    emu::launch({ceil_div(T, 8), ceil_div(here, 32), B}, 256, TILES, [&] {
      finish(aligned, k, v, credit_from, dk, dv, scale, T, R, first, here, key_from, temperature);
    });
  }
}
