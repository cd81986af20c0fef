// Sums over lanes alone, with a C face for ctypes.
#include "emulator.hpp"
#define M 1
#define V 1
#define P 1
#define GATE 0
#define SCAN 0
#define UTILITY 0
#define OFFSET 1
#define CAPPED 0
#define PACKED 0
#define DROPOUT 0
#define WINDOWED 0
#include "diagonals.cuh"

extern "C" void emulate_sums(const float* values, float* sums, int* slots) {
  emu::launch({1}, 32, 0, [&] {
    const int lane = threadIdx.x;
    float mine[SUM_COUNT];
    for (int n = 0; n < SUM_COUNT; ++n) mine[n] = values[lane * SUM_COUNT + n];
    sums[lane] = spread_sum<SUM_COUNT>(mine, lane);
    slots[lane] = slot_of<SUM_COUNT>(lane);
  });
}
