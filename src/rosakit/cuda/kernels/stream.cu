// Streaming by diagonals: the state of a stream is, for every lag d, how many symbols the suffixes
// that end at the newest query and at the key d before it share.
//
// One more position i makes runs[d] = q[i] == k[i - d] ? runs[d] + 1 : 0 for d in 1..i, and the match
// is the largest run, the smallest lag on ties: exact, without an index, and every stream in one
// pass over its state. A lag keeps its place when the stream grows. One thread block a stream.

typedef unsigned char u8;
typedef unsigned int u32;
constexpr u32 FULL = 0xffffffffu;

__device__ __forceinline__ void better(u32& size, u32& lag, u32 other_size, u32 other_lag) {
  if (other_size > size || (other_size == size && other_lag < lag)) {
    size = other_size, lag = other_lag;
  }
}

struct Best {             // in shared memory
  u32 size[32], lag[32];  // of each warp
};

__device__ __forceinline__ Best& shared_best() {
#ifdef ROSAKIT_EMULATE
  return *(Best*)emulated_shared();
#else
  __shared__ Best best;
  return best;
#endif
}

// q, k: [S][n], new symbols; mask: [S / routes][n] or null, 0 leaves a symbol out; queries, keys,
// runs: [S][capacity]; lengths: [S / routes], before this call, which does not change them;
// position, length: [S][n]. capacity is a multiple of 16.
extern "C" __global__ void __launch_bounds__(512)
extend_streams(const u8* __restrict__ q, const u8* __restrict__ k, const u8* __restrict__ mask,
               u8* queries, u8* keys, u32* runs, const long long* __restrict__ lengths,
               int* __restrict__ position, int* __restrict__ length, u32 routes, u32 n,
               size_t capacity, u32 max_length, u32 min_length) {
  Best& best = shared_best();
  const u32 s = blockIdx.x, row = s / routes, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  u8* own_keys = keys + (size_t)s * capacity;
  u8* own_queries = queries + (size_t)s * capacity;
  uint4* own_runs = (uint4*)(runs + (size_t)s * capacity);
  u32 i = (u32)lengths[row];
  for (u32 at = 0; at < n; ++at) {
    const size_t out = (size_t)s * n + at;
    if (mask && !mask[(size_t)row * n + at]) {
      if (threadIdx.x == 0) position[out] = -1, length[out] = 0;
      continue;
    }
    const u32 symbol = q[out];
    u32 size = 0, lag = FULL;
    for (u32 g = threadIdx.x; 4 * g < i; g += blockDim.x) {
      // Four lags from 4 g + 1 on: the keys from i - 1 - 4 g downwards.
      const uint4 old = own_runs[g];
      const u32 newest = i - 1 - 4 * g;
      u32 run[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
      for (u32 e = 0; e < 4; ++e) {
        const bool same = e <= newest && own_keys[newest - (e <= newest ? e : 0)] == symbol;
        run[e] = same ? run[e] + 1 : 0;
        const u32 counted = run[e] < max_length ? run[e] : max_length;
        if (counted > size) size = counted, lag = 4 * g + 1 + e;
      }
      own_runs[g] = {run[0], run[1], run[2], run[3]};
    }
    for (int step = 16; step; step /= 2) {
      const u32 other_size = __shfl_xor_sync(FULL, size, step);
      const u32 other_lag = __shfl_xor_sync(FULL, lag, step);
      better(size, lag, other_size, other_lag);
    }
    if (lane == 0) best.size[warp] = size, best.lag[warp] = lag;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (u32 w = 1; w < blockDim.x / 32; ++w) better(size, lag, best.size[w], best.lag[w]);
      const bool found = size >= min_length;
      position[out] = found ? (int)(i - lag + 1) : -1;
      length[out] = found ? (int)size : 0;
      own_keys[i] = k[out];
      own_queries[i] = (u8)symbol;
    }
    __syncthreads();
    ++i;
  }
}

// The runs at the newest position of every stream, from its symbols; 0 at lags that do not exist.
extern "C" __global__ void __launch_bounds__(512)
rebuild_runs(const u8* __restrict__ queries, const u8* __restrict__ keys, u32* __restrict__ runs,
             const long long* __restrict__ lengths, u32 routes, size_t capacity, u32 max_length) {
  constexpr u32 ALONE = 32;  // symbols that a thread compares before its warp helps
  const u32 s = blockIdx.x, lane = threadIdx.x & 31;
  const u8* q = queries + (size_t)s * capacity;
  const u8* k = keys + (size_t)s * capacity;
  const u32 count = (u32)lengths[s / routes];
  for (u32 first = threadIdx.x & ~31u; first < capacity; first += blockDim.x) {
    const u32 d = first + lane + 1;
    const bool exists = d < count;
    const u32 limit = exists ? (count - d < max_length ? count - d : max_length) : 0;
    u32 run = 0;
    while (run < limit && run < ALONE && q[count - 1 - run] == k[count - 1 - d - run]) ++run;
    u32 more = __ballot_sync(FULL, run == ALONE && run < limit);
    while (more) {
      const u32 from = __ffs(more) - 1;
      more &= more - 1;
      const u32 lag = first + from + 1, most = __shfl_sync(FULL, limit, from);
      u32 known = ALONE;
      while (known < most) {
        const u32 at = known + lane;
        const bool differs = at >= most || q[count - 1 - at] != k[count - 1 - lag - at];
        const u32 word = __ballot_sync(FULL, differs);
        known += word ? __ffs(word) - 1 : 32;
        if (word) break;
      }
      if (lane == from) run = known;
    }
    if (d - 1 < capacity) runs[(size_t)s * capacity + d - 1] = run;
  }
}
