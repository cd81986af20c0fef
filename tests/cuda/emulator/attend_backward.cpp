// The backward pass of the pairwise forms under emulation, with a C face for ctypes.
#include "emulator.hpp"
#include "diagonals.cuh"
#include "attend_backward.cu"

extern "C" void emulate_backward(const float* q, const float* k, const float* w, const float* g,
                                 const float* lse, const float* delta, const int* starts,
                                 const i64* seed, float* dq, float* dk, float* dw, float* marks,
                                 float* ring, unsigned programs, int T, int length, int routes,
                                 int workers, int window, float slope, float bias, float sharp,
                                 float cap, float peak, u32 threshold, float inverse) {
  emu::launch({programs}, 32, HELD * (M + V) * sizeof(float), [&] {
    attend_backward(q, k, w, g, lse, delta, starts, seed, dq, dk, dw, marks, ring, T, length,
                    routes, workers, window, slope, bias, sharp, cap, peak, threshold, inverse);
  });
}
