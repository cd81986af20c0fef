// The forward pass of the pairwise forms under emulation, with a C face for ctypes.
#include "emulator.hpp"
#include "diagonals.cuh"
#include "attend_forward.cu"

extern "C" void emulate_forward(const float* q, const float* k, const float* w, const int* starts,
                                const i64* seed, float* top, float* sum, float* out,
                                unsigned programs, int T, int length, int routes, int workers,
                                int window, float slope, float bias, float sharp, float cap,
                                float peak, u32 threshold, float inverse) {
  emu::launch({programs}, 32, 0, [&] {
    attend_forward(q, k, w, starts, seed, top, sum, out, T, length, routes, workers, window, slope,
                   bias, sharp, cap, peak, threshold, inverse);
  });
}
