// Runs CUDA kernels of this project on the CPU, one fiber a thread, for machines without a GPU.
//
// Only what the kernels use: blocks in turn, threads of a block interleaved at barriers and warp
// collectives, plain loads and stores, integer and float atomics. A collective that not all of its
// threads reach aborts with a message, which is how divergence bugs show.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define ROSAKIT_EMULATE 1
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct dim3 { unsigned x = 1, y = 1, z = 1; };

namespace emu {

struct Warp {
  unsigned slot[32], result[2][32];
  int arrived = 0;
  unsigned long generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 thread;
  bool done = false;
};

inline dim3 block_index, block_size, grid_size;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline Fiber* current = nullptr;
inline unsigned char* shared = nullptr;
inline std::function<void()> body;
inline unsigned barrier_arrived = 0, barrier_generation = 0;
inline unsigned long progress = 0;

inline void yield() { swapcontext(&current->context, &scheduler); }
inline void entry() {
  body();
  current->done = true;
  ++progress;
  swapcontext(&current->context, &scheduler);
}

inline const unsigned* collect(unsigned value) {
  Warp& w = warps[current->thread.x / 32];
  const unsigned lane = current->thread.x % 32;
  const unsigned long mine = w.generation;
  w.slot[lane] = value;
  ++progress;
  if (++w.arrived == 32) {
    std::memcpy(w.result[mine & 1], w.slot, sizeof w.slot);
    w.arrived = 0;
    ++w.generation;
  } else {
    while (w.generation == mine) yield();
  }
  return w.result[mine & 1];
}

inline void launch(dim3 grid, unsigned block, std::size_t shared_bytes,
                   std::function<void()> kernel) {
  std::vector<unsigned char> memory(shared_bytes + 64, 0xa5);
  shared = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) &
                                            ~std::uintptr_t(63));
  body = std::move(kernel);
  grid_size = grid;
  block_size = {block, 1, 1};
  for (unsigned b = 0; b < grid.x * grid.y * grid.z; ++b) {
    block_index = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
    fibers.assign(block, {});
    warps.assign(block / 32, {});
    barrier_arrived = 0;
    for (unsigned t = 0; t < block; ++t) {
      Fiber& f = fibers[t];
      f.stack.resize(64 * 1024);
      f.thread = {t, 0, 0};
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
    }
    unsigned left = block;
    while (left) {
      const unsigned long before = progress;
      for (Fiber& f : fibers) {
        if (f.done) continue;
        current = &f;
        swapcontext(&scheduler, &f.context);
        if (f.done) --left;
      }
      if (progress == before) {
        std::fprintf(stderr, "deadlock: threads wait at different barriers\n");
        std::abort();
      }
    }
  }
}

}  // namespace emu

#define threadIdx (emu::current->thread)
#define blockIdx emu::block_index
#define blockDim emu::block_size
#define gridDim emu::grid_size

inline unsigned char* emulated_shared() { return emu::shared; }
inline void __syncthreads() {
  ++emu::progress;
  const unsigned mine = emu::barrier_generation;
  if (++emu::barrier_arrived == emu::block_size.x) {
    emu::barrier_arrived = 0;
    ++emu::barrier_generation;
  } else {
    while (emu::barrier_generation == mine) emu::yield();
  }
}
inline unsigned __ballot_sync(unsigned, unsigned predicate) {
  const unsigned* all = emu::collect(predicate != 0);
  unsigned word = 0;
  for (int i = 0; i < 32; ++i) word |= all[i] << i;
  return word;
}
template <typename T> T __shfl_sync(unsigned, T value, int from) {
  static_assert(sizeof(T) == 4);
  unsigned raw;
  std::memcpy(&raw, &value, 4);
  raw = emu::collect(raw)[from & 31];
  std::memcpy(&value, &raw, 4);
  return value;
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int with) {
  return __shfl_sync(mask, value, (int)(threadIdx.x % 32) ^ with);
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, lane >= by ? lane - by : lane);
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return __shfl_sync(mask, value, lane + by < 32 ? lane + by : lane);
}
inline void __syncwarp() { emu::collect(0); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return (unsigned)(((unsigned long long)high << 32 | low) >> (by & 31));
}
inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __expf(float x) { return std::exp(x); }
inline long long __float2ll_rn(float x) { return std::llrint(x); }
template <typename T> T atomicAdd(T* at, T by) {
  const T old = *at;
  *at += by;
  return old;
}
inline unsigned atomicOr(unsigned* at, unsigned bits) {
  const unsigned old = *at;
  *at |= bits;
  return old;
}
template <typename T> T atomicMax(T* at, T value) {
  const T old = *at;
  if (value > old) *at = value;
  return old;
}
template <typename T> T min(T a, T b) { return a < b ? a : b; }
template <typename T> T max(T a, T b) { return a > b ? a : b; }
