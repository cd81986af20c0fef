// The token-granularity matcher under emulation, with a C face for ctypes.
#include "emulator.hpp"
#include "rank.cuh"
#include "chains.cuh"
#include "level.cuh"
#include "levels.cuh"
#include "walk.cuh"
#include "match.cu"

extern "C" void emulate_match(const Symbol* q, const Symbol* k, const int* segments, int* position,
                              int* length, int* flipped, unsigned routes, unsigned routes_per_row,
                              unsigned T, unsigned max_length, unsigned min_length,
                              unsigned super_shift, unsigned min_depth, unsigned max_depth,
                              unsigned near, unsigned grid) {
  const std::size_t stride = 128 * (std::size_t)T + 131072;
  std::vector<u8> scratch(stride * grid + 16, 0x5a);
  u8* aligned = (u8*)(((std::uintptr_t)scratch.data() + 15) & ~(std::uintptr_t)15);
  emu::launch({grid, 1, 1}, THREADS, 128 * (std::size_t)T + 131072, [&] {
    suffix_match(q, k, segments, position, length, flipped, aligned, stride, routes, routes_per_row,
                 T, max_length, min_length, super_shift, min_depth, max_depth, near);
  });
}
