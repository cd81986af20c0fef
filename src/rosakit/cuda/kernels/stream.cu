// Streaming by diagonals: the state of a stream is, for every lag d, how many symbols the suffixes
// that end at the newest query and at the key d before it share.
//
// One more position i makes runs[d] = q[i] == k[i - d] ? runs[d] + 1 : 0 for d in 1..i, and the match
// is the largest run, the smallest lag on ties: exact, without an index, and every stream in one
// pass over its state. A lag keeps its place when the stream grows. One thread block a stream.
//
// Runs are kept in 16 bits and stop at SATURATED. Where the longest is one of those, the history
// itself says which is longest (`settle`), so the answer is exact at every length. Symbols of up to
// four bits lie two a byte.
//
// Compile-time: NIBBLES (1: two symbols a byte); M (bits a route), SCALAR and E_SCALAR (dtypes of
// channels and levels, see format.cuh) for step_streams.

#ifndef SATURATED
#define SATURATED 65535
#endif
constexpr u32 FULL = 0xffffffffu;
typedef Format<SCALAR> Real;
typedef Real::type Scalar;
typedef Format<E_SCALAR> EReal;
typedef EReal::type EScalar;

struct Symbols {  // of one stream; 16-byte aligned
  u8* bytes;
  __device__ __forceinline__ u32 at(u32 p) const {
    return NIBBLES ? bytes[p >> 1] >> (p & 1) * 4 & 15 : bytes[p];
  }
  // Appending only: what lies behind p in its byte is forgotten.
  __device__ __forceinline__ void put(u32 p, u32 symbol) {
    if (!NIBBLES) bytes[p] = (u8)symbol;
    else bytes[p >> 1] = (u8)(p & 1 ? (bytes[p >> 1] & 15) | symbol << 4 : symbol);
  }
  // Bit e says whether the symbol at newest - e is this one, for e in 0..7 as far as it exists.
  __device__ __forceinline__ u32 same(u32 newest, u32 symbol) const {
    u32 found = 0;
    if (NIBBLES) {
      const u32* words = (const u32*)bytes;
      const u32 w = newest >> 3, by = 4 * ((newest & 7) + 1);
      const u32 high = words[w];
      const u32 all = by == 32 ? high : __funnelshift_r(w ? words[w - 1] : 0, high, by);
      const u32 differ = all ^ symbol * 0x11111111u;  // the newest in the highest nibble
#pragma unroll
      for (u32 e = 0; e < 8; ++e) found |= (u32)((differ >> (28 - 4 * e) & 15) == 0) << e;
    } else {
#pragma unroll
      for (u32 e = 0; e < 8; ++e) {
        found |= (u32)(bytes[newest - (e <= newest ? e : 0)] == symbol) << e;
      }
    }
    return newest < 7 ? found & ((2u << newest) - 1) : found;
  }
};

__device__ __forceinline__ Symbols stream_of(u8* table, u32 s, size_t capacity) {
  return {table + s * (NIBBLES ? capacity / 2 : capacity)};
}

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

// The best of the block's threads, known to all of them.
__device__ __forceinline__ void reduce(Best& best, u32& size, u32& lag) {
  for (int step = 16; step; step /= 2) {
    const u32 other_size = __shfl_xor_sync(FULL, size, step);
    const u32 other_lag = __shfl_xor_sync(FULL, lag, step);
    better(size, lag, other_size, other_lag);
  }
  if ((threadIdx.x & 31) == 0) best.size[threadIdx.x >> 5] = size, best.lag[threadIdx.x >> 5] = lag;
  __syncthreads();
  for (u32 w = 0; w < blockDim.x / 32; ++w) better(size, lag, best.size[w], best.lag[w]);
  __syncthreads();
}

// How many symbols the suffixes of `length` share from `known` on, at most `limit`: a warp's work.
__device__ __forceinline__ u32 shared_suffix(const Symbols& q, const Symbols& k, u32 newest,
                                             u32 lag, u32 known, u32 limit) {
  const u32 lane = threadIdx.x & 31;
  while (known < limit) {
    const u32 at = known + lane;
    const bool differs = at >= limit || q.at(newest - at) != k.at(newest - lag - at);
    const u32 word = __ballot_sync(FULL, differs);
    known += word ? __ffs(word) - 1 : 32;
    if (word) break;
  }
  return known;
}

// The best lag where several runs are SATURATED: read from the history, longest bound first.
__device__ __noinline__ void settle(const Symbols& q, const Symbols& k, const u16* runs, u32 i,
                                    u32 max_length, Best& best, u32& size, u32& lag) {
  const u32 lane = threadIdx.x & 31;
  size = 0, lag = FULL;
  for (u32 first = threadIdx.x & ~31u; first < i; first += blockDim.x) {
    const u32 d = first + lane + 1;
    u32 left = __ballot_sync(FULL, d <= i && runs[d - 1] == SATURATED);
    while (left) {
      const u32 from = __ffs(left) - 1, candidate = first + from + 1;
      left &= left - 1;
      const u32 exist = i - candidate + 1;
      const u32 limit = exist < max_length ? exist : max_length;
      // Lags come in increasing order: a tie stays with the earlier one.
      if (limit <= size || (size && q.at(i - size) != k.at(i - candidate - size))) continue;
      const u32 run = shared_suffix(q, k, i, candidate, SATURATED, limit);
      if (run > size) size = run, lag = candidate;
    }
  }
  reduce(best, size, lag);
}

// Takes in the query at position i, which has i keys before it; all threads learn the best lag.
__device__ __forceinline__ void advance(const Symbols& q, const Symbols& k, u16* runs, u32 i,
                                        u32 symbol, u32 max_length, Best& best, u32& size,
                                        u32& lag) {
  uint4* own = (uint4*)runs;
  size = 0, lag = FULL;
  for (u32 g = threadIdx.x; 8 * g < i; g += blockDim.x) {
    // Eight lags from 8 g + 1 on: the keys from i - 1 - 8 g downwards.
    const uint4 old = own[g];
    const u32 same = k.same(i - 1 - 8 * g, symbol);
    u32 word[4] = {old.x, old.y, old.z, old.w};
#pragma unroll
    for (u32 e = 0; e < 8; ++e) {
      const u32 before = word[e / 2] >> e % 2 * 16 & 0xffff;
      const u32 run = same >> e & 1 ? (before < SATURATED ? before + 1 : before) : 0;
      word[e / 2] = e % 2 ? (word[e / 2] & 0xffff) | run << 16 : (word[e / 2] & ~0xffffu) | run;
      const u32 counted = run < max_length ? run : max_length;
      if (counted > size) size = counted, lag = 8 * g + 1 + e;
    }
    own[g] = {word[0], word[1], word[2], word[3]};
  }
  reduce(best, size, lag);
  if (size >= SATURATED && max_length > SATURATED) settle(q, k, runs, i, max_length, best, size, lag);
}

// q, k: [S][n], new symbols; mask: [S / routes][n] or null, 0 leaves a symbol out; queries, keys:
// [S][capacity] symbols; runs: [S][capacity]; lengths: [S / routes], before this call, which does
// not change them, or null where all are `start`; position, length: [S][n]. capacity is a multiple
// of 32.
extern "C" __global__ void __launch_bounds__(512)
extend_streams(const u8* __restrict__ q, const u8* __restrict__ k, const u8* __restrict__ mask,
               u8* queries, u8* keys, u16* runs, const long long* __restrict__ lengths,
               int* __restrict__ position, int* __restrict__ length, u32 start, u32 routes, u32 n,
               size_t capacity, u32 max_length, u32 min_length) {
  Best& best = shared_best();
  const u32 s = blockIdx.x, row = s / routes;
  Symbols own_keys = stream_of(keys, s, capacity), own_queries = stream_of(queries, s, capacity);
  u16* own_runs = runs + s * capacity;
  u32 i = lengths ? (u32)lengths[row] : start;
  for (u32 at = 0; at < n; ++at) {
    const size_t out = (size_t)s * n + at;
    if (mask && !mask[(size_t)row * n + at]) {
      if (threadIdx.x == 0) position[out] = -1, length[out] = 0;
      continue;
    }
    const u32 symbol = q[out];
    u32 size, lag;
    if (threadIdx.x == 0) own_queries.put(i, symbol);
    advance(own_queries, own_keys, own_runs, i, symbol, max_length, best, size, lag);
    if (threadIdx.x == 0) {
      const bool found = size >= min_length;
      position[out] = found ? (int)(i - lag + 1) : -1;
      length[out] = found ? (int)size : 0;
      own_keys.put(i, k[out]);
    }
    __syncthreads();
    ++i;
  }
}

__device__ __forceinline__ u32 packed(const Scalar* x) {
  u32 symbol = 0;
#pragma unroll
  for (u32 m = 0; m < M; ++m) symbol |= (u32)(Real::widen(x[m]) > 0.0f) << m;
  return symbol;
}

// A layer's step from its projections to what they read (semantics sections 1 and 2). q, k, v:
// [S / routes * n] tokens of C = routes * M channels, `stride` apart; e0, e1: [C]; e_null: [C] or
// null; y: [S / routes][n][C]; values: [S][capacity] symbols; position, length: [S][n] or null.
// unmatched: 0 zero or e_null, 1 self. The rest as extend_streams.
extern "C" __global__ void __launch_bounds__(512)
step_streams(const Scalar* __restrict__ q, const Scalar* __restrict__ k,
             const Scalar* __restrict__ v, const EScalar* __restrict__ e0,
             const EScalar* __restrict__ e1, const EScalar* __restrict__ e_null,
             const u8* __restrict__ mask, u8* queries, u8* keys, u8* values, u16* runs,
             const long long* __restrict__ lengths, Scalar* __restrict__ y,
             int* __restrict__ position, int* __restrict__ length, u32 start, u32 routes, u32 n,
             size_t capacity, u32 max_length, u32 min_length, u32 stride, u32 unmatched) {
  Best& best = shared_best();
  const u32 s = blockIdx.x, row = s / routes, first = s % routes * M;
  Symbols own_keys = stream_of(keys, s, capacity), own_queries = stream_of(queries, s, capacity);
  Symbols own_values = stream_of(values, s, capacity);
  u16* own_runs = runs + s * capacity;
  u32 i = lengths ? (u32)lengths[row] : start;
  for (u32 at = 0; at < n; ++at) {
    const size_t token = (size_t)row * n + at, from = token * stride + first;
    const bool real = !mask || mask[token];
    const u32 value = packed(v + from);
    u32 size = 0, lag = FULL;
    if (real) {
      const u32 symbol = packed(q + from);
      if (threadIdx.x == 0) own_queries.put(i, symbol);
      advance(own_queries, own_keys, own_runs, i, symbol, max_length, best, size, lag);
    }
    const bool found = real && size >= min_length;
    const u32 place = found ? i - lag + 1 : i;
    if (threadIdx.x < M) {
      const u32 m = threadIdx.x, c = first + m;
      const u32 read = place == i ? value : own_values.at(place);
      float wanted = e_null ? EReal::widen(e_null[c]) : 0.0f;
      if (found || unmatched == 1) wanted = EReal::widen(read >> m & 1 ? e1[c] : e0[c]);
      y[token * routes * M + c] = Real::narrow(wanted);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if (real) own_keys.put(i, packed(k + from)), own_values.put(i, value);
      if (position) {
        position[(size_t)s * n + at] = found ? (int)place : -1;
        length[(size_t)s * n + at] = found ? (int)size : 0;
      }
    }
    __syncthreads();
    if (real) ++i;
  }
}

// The runs at the newest position of every stream, from its symbols; 0 at lags that do not exist.
extern "C" __global__ void __launch_bounds__(512)
rebuild_runs(u8* __restrict__ queries, u8* __restrict__ keys, u16* __restrict__ runs,
             const long long* __restrict__ lengths, u32 start, u32 routes, size_t capacity) {
  constexpr u32 ALONE = 32;  // symbols that a thread compares before its warp helps
  const u32 s = blockIdx.x, lane = threadIdx.x & 31;
  const Symbols q = stream_of(queries, s, capacity), k = stream_of(keys, s, capacity);
  const u32 count = lengths ? (u32)lengths[s / routes] : start;
  for (u32 first = threadIdx.x & ~31u; first < capacity; first += blockDim.x) {
    const u32 d = first + lane + 1;
    const bool exists = d < count;
    const u32 limit = exists ? (count - d < SATURATED ? count - d : SATURATED) : 0;
    u32 run = 0;
    while (run < limit && run < ALONE && q.at(count - 1 - run) == k.at(count - 1 - d - run)) ++run;
    u32 more = __ballot_sync(FULL, run == ALONE && run < limit);
    while (more) {
      const u32 from = __ffs(more) - 1;
      more &= more - 1;
      const u32 most = __shfl_sync(FULL, limit, from);
      const u32 known = shared_suffix(q, k, count - 1, first + from + 1, ALONE, most);
      if (lane == from) run = known;
    }
    if (d - 1 < capacity) runs[s * capacity + d - 1] = (u16)run;
  }
}
