// Retrieval and the counterfactual backward pass, each tensor moved once.
//
// A warp holds 32 neighbouring routes, a lane one route's M channels, so that every access to
// [B, T, C] tensors is contiguous over the warp; positions, which are [B, R, T], are turned through
// shared memory in tiles of 32 x 32. Sums into value and key positions go to an accumulator of one
// chunk of routes, small enough to stay in the L2 cache, laid out [T][routes][2][M] (values, keys).
//
// Compile-time: M (bits a route), SCALAR (0: float32, 1: bfloat16, 2: float16), E_SCALAR (the dtype
// of e0 and e1; see format.cuh), FIXED (1: 64-bit fixed-point sums, whose order does not matter).

typedef Format<SCALAR> Real;
typedef Real::type Scalar;
typedef Format<E_SCALAR> EReal;
typedef EReal::type EScalar;

#if FIXED
typedef u64 Sum;
__device__ __forceinline__ Sum to_sum(float x, float scale) {
  return (u64)__float2ll_rn(x * scale);
}
__device__ __forceinline__ float from_sum(Sum x, float scale) {
  return (float)(long long)x / scale;
}
#else
typedef float Sum;
__device__ __forceinline__ Sum to_sum(float x, float) { return x; }
__device__ __forceinline__ float from_sum(Sum x, float) { return x; }
#endif

template <typename T> struct alignas(sizeof(T) * M % 16 == 0 ? 16 : sizeof(T) * M % 8 == 0 ? 8
                                     : sizeof(T) * M % 4 == 0 ? 4 : sizeof(T)) Row {
  T at[M];
};

__device__ __forceinline__ void load(const Scalar* from, float* to) {
  const Row<Scalar> row = *(const Row<Scalar>*)from;
#pragma unroll
  for (int m = 0; m < M; ++m) to[m] = Real::widen(row.at[m]);
}
__device__ __forceinline__ void store(Scalar* to, const float* from) {
  Row<Scalar> row;
#pragma unroll
  for (int m = 0; m < M; ++m) row.at[m] = Real::narrow(from[m]);
  *(Row<Scalar>*)to = row;
}
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
__device__ __forceinline__ float slope(float x) {
  const float p = sigmoid(x);
  return p * (1.0f - p);
}

__device__ __forceinline__ void add(Sum* at, const float* x, float scale) {
#if !FIXED && M % 4 == 0 && !defined(ROSAKIT_EMULATE) && __CUDA_ARCH__ >= 900
#pragma unroll
  for (int m = 0; m < M; m += 4) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at + m),
                 "f"(x[m]), "f"(x[m + 1]), "f"(x[m + 2]), "f"(x[m + 3]) : "memory");
  }
#else
#pragma unroll
  for (int m = 0; m < M; ++m) atomicAdd(at + m, to_sum(x[m], scale));
#endif
}

// Positions of 32 routes x 32 times, turned: at[route][time].
struct Tile {
  int at[32][33];
};

__device__ __forceinline__ void load_tile(Tile& tile, const int* position, u32 routes, u32 r0,
                                          u32 t0, u32 end, u32 T) {
  for (u32 r = threadIdx.x / 32; r < 32; r += blockDim.x / 32) {
    const u32 t = t0 + threadIdx.x % 32;
    const bool in = r0 + r < routes && t < end;
    tile.at[r][threadIdx.x % 32] = in ? position[(size_t)(r0 + r) * T + t] : -1;
  }
}

__device__ __forceinline__ u8* shared_memory() {
#ifdef ROSAKIT_EMULATE
  return emulated_shared();
#else
  extern __shared__ uint4 shared_words[];
  return (u8*)shared_words;
#endif
}

enum Unmatched { ZERO = 0, SELF = 1, NULL_VALUE = 2 };

// y[b, t, c] = e1 or e0 by the bit of v[b, position, c]. Grid: (ceil(T / 32), ceil(R / 32), B).
extern "C" __global__ void __launch_bounds__(256)
retrieve(const Scalar* __restrict__ v, const int* __restrict__ position,
         const EScalar* __restrict__ e0, const EScalar* __restrict__ e1,
         const EScalar* __restrict__ e_null, Scalar* __restrict__ y, u32 T, u32 R, u32 unmatched) {
  Tile& tile = *(Tile*)shared_memory();
  const u32 t0 = blockIdx.x * 32, r0 = blockIdx.y * 32, lane = threadIdx.x % 32, r = r0 + lane;
  const size_t row = (size_t)blockIdx.z * T, C = (size_t)R * M;
  load_tile(tile, position + row * R, R, r0, t0, T, T);
  __syncthreads();
  if (r >= R) return;
  float low[M], high[M], none[M];
#pragma unroll
  for (int m = 0; m < M; ++m) {
    low[m] = EReal::widen(e0[r * M + m]);
    high[m] = EReal::widen(e1[r * M + m]);
    none[m] = unmatched == NULL_VALUE ? EReal::widen(e_null[r * M + m]) : 0.0f;
  }
  for (u32 i = threadIdx.x / 32; i < 32 && t0 + i < T; i += blockDim.x / 32) {
    const u32 t = t0 + i;
    int p = tile.at[lane][i];
    if (p < 0 && unmatched == SELF) p = (int)t;
    float out[M];
    if (p >= 0) {
      load(v + (row + p) * C + r * M, out);
#pragma unroll
      for (int m = 0; m < M; ++m) out[m] = out[m] > 0.0f ? high[m] : low[m];
    } else {
#pragma unroll
      for (int m = 0; m < M; ++m) out[m] = none[m];
    }
    store(y + (row + t) * C + r * M, out);
  }
}

// The value that a read at p contributes: sum_c theta[c] * vf[p, c]; 0 for a null.
__device__ __forceinline__ float contribution(const Scalar* v_row, const float* theta, bool soft) {
  float x[M], sum = 0.0f;
  load(v_row, x);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    sum += theta[m] * (soft ? sigmoid(x[m]) : (x[m] > 0.0f ? 1.0f : 0.0f));
  }
  return sum;
}

// Per position: dq, and the sums for v and k into `sums`; partial sums of the gradients of e0, e1
// and e_null, one row a thread block: partials [B * slices][3][C]. flipped null: no credit for q, k.
// Grid: (slices of `slice` positions, ceil(chunk routes / 32), B); routes [first, first + chunk).
extern "C" __global__ void __launch_bounds__(256)
credit(const Scalar* __restrict__ grad, const Scalar* __restrict__ q, const Scalar* __restrict__ v,
       const EScalar* __restrict__ e0, const EScalar* __restrict__ e1,
       const int* __restrict__ position, const int* __restrict__ flipped, Scalar* __restrict__ dq,
       Sum* __restrict__ sums, float* __restrict__ partials, const float* __restrict__ fixed_scale,
       u32 T, u32 R, u32 first, u32 chunk, u32 slice, u32 unmatched, u32 soft, float temperature) {
  u8* shared = shared_memory();
  Tile& factual = *(Tile*)shared;
  Tile* other = (Tile*)(shared + sizeof(Tile));                       // [M]
  float* reduce = (float*)shared;                                     // [3][8][32 * M], at the end
  const u32 lane = threadIdx.x % 32, local = blockIdx.y * 32 + lane, r = first + local;
  const u32 r0 = first + blockIdx.y * 32, end_route = first + chunk;
  const size_t row = (size_t)blockIdx.z * T, C = (size_t)R * M;
  const bool on = local < chunk;
  const float scale = FIXED ? *fixed_scale : 1.0f;
  float gap[M], g_one[M] = {}, g_zero[M] = {}, g_null[M] = {};
#pragma unroll
  for (int m = 0; m < M; ++m) {
    gap[m] = on ? EReal::widen(e1[r * M + m]) - EReal::widen(e0[r * M + m]) : 0.0f;
  }
  const u32 begin = blockIdx.x * slice, end = min(T, begin + slice);
  for (u32 t0 = begin; t0 < end; t0 += 32) {
    __syncthreads();
    load_tile(factual, position + row * R, end_route, r0, t0, end, T);
    if (flipped) {
      for (u32 i = threadIdx.x; i < 32 * 32 * M; i += blockDim.x) {
        const u32 j = i % (32 * M), at_r = i / (32 * M), t = t0 + j / M;
        const bool in = r0 + at_r < end_route && t < end;
        other[j % M].at[at_r][j / M] =
            in ? flipped[((row * R + (size_t)(r0 + at_r) * T) + t) * M + j % M] : -1;
      }
    }
    __syncthreads();
    if (!on) continue;
#pragma unroll 2
    for (u32 i = threadIdx.x / 32; i < 32; i += 8) {
      const u32 t = t0 + i;
      if (t >= end) break;
      float g[M], theta[M], x[M];
      load(grad + (row + t) * C + r * M, g);
#pragma unroll
      for (int m = 0; m < M; ++m) theta[m] = g[m] * gap[m];
      const int matched = factual.at[lane][i];
      const int p = matched < 0 && unmatched == SELF ? (int)t : matched;
      float read = 0.0f;
      if (p >= 0) {
        load(v + (row + p) * C + r * M, x);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const bool one = x[m] > 0.0f;
          read += theta[m] * (soft ? sigmoid(x[m]) : (one ? 1.0f : 0.0f));
          g_one[m] += one ? g[m] : 0.0f;
          g_zero[m] += one ? 0.0f : g[m];
        }
        add(sums + ((row + p) * chunk + local) * 2 * M, theta, scale);
      } else {
#pragma unroll
        for (int m = 0; m < M; ++m) g_null[m] += g[m];
      }
      if (!flipped) continue;
      float slope_q[M], to_key[M];
      load(q + (row + t) * C + r * M, x);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int cf = other[m].at[lane][i];
        const int cf_read = cf < 0 && unmatched == SELF ? (int)t : cf;
        const float sign = x[m] > 0.0f ? 1.0f : -1.0f;
        slope_q[m] = to_key[m] = 0.0f;
        if (cf == matched) continue;  // the same place read either way: no credit
        const float would =
            cf_read >= 0 ? contribution(v + (row + cf_read) * C + r * M, theta, soft) : 0.0f;
        slope_q[m] = sign * (read - would) * slope(temperature * x[m]);
        to_key[m] = sign * read;
        if (cf >= 0) {
          atomicAdd(sums + ((row + cf) * chunk + local) * 2 * M + M + m,
                    to_sum(-sign * would, scale));
        }
      }
      store(dq + (row + t) * C + r * M, slope_q);
      if (matched >= 0) add(sums + ((row + matched) * chunk + local) * 2 * M + M, to_key, scale);
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; ++m) {
    reduce[(0 * 8 + threadIdx.x / 32) * 32 * M + lane * M + m] = g_zero[m];
    reduce[(1 * 8 + threadIdx.x / 32) * 32 * M + lane * M + m] = g_one[m];
    reduce[(2 * 8 + threadIdx.x / 32) * 32 * M + lane * M + m] = g_null[m];
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < 3 * 32 * M; i += blockDim.x) {
    const u32 which = i / (32 * M), c = i % (32 * M);
    if (blockIdx.y * 32 + c / M >= chunk) continue;
    float sum = 0.0f;
    for (u32 warp = 0; warp < 8; ++warp) sum += reduce[(which * 8 + warp) * 32 * M + c];
    partials[((size_t)(blockIdx.z * gridDim.x + blockIdx.x) * 3 + which) * C + r0 * M + c] = sum;
  }
}

// From sums to dv and dk. key_from: 0: the key before the successor, 1: the successor itself,
// 2: `credit_from` [B, R, T] names the successor whose sum the position takes, or -1.
// Grid: (ceil(T / 8), ceil(chunk / 32), B) of 256 threads.
extern "C" __global__ void __launch_bounds__(256)
finish(const Sum* __restrict__ sums, const Scalar* __restrict__ k, const Scalar* __restrict__ v,
       const int* __restrict__ credit_from, Scalar* __restrict__ dk, Scalar* __restrict__ dv,
       const float* __restrict__ fixed_scale, u32 T, u32 R, u32 first, u32 chunk, u32 key_from,
       float temperature) {
  const u32 t = blockIdx.x * 8 + threadIdx.x / 32, local = blockIdx.y * 32 + threadIdx.x % 32;
  if (t >= T || local >= chunk) return;
  const u32 r = first + local;
  const size_t row = (size_t)blockIdx.z * T, C = (size_t)R * M, at = (row + t) * C + r * M;
  const float scale = FIXED ? *fixed_scale : 1.0f;
  float x[M];
  load(v + at, x);
  Row<Sum> sum = *(const Row<Sum>*)(sums + ((row + t) * chunk + local) * 2 * M);
#pragma unroll
  for (int m = 0; m < M; ++m) x[m] = slope(x[m]) * from_sum(sum.at[m], scale);
  store(dv + at, x);
  if (!dk) return;
  long long from = t;
  if (key_from == 0) from = t + 1 < T ? (long long)t + 1 : -1;
  if (key_from == 2) from = credit_from[(row * R + (size_t)r * T) + t];
  load(k + at, x);
  if (from >= 0) sum = *(const Row<Sum>*)(sums + ((row + from) * chunk + local) * 2 * M + M);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    x[m] = from >= 0 ? slope(temperature * x[m]) * from_sum(sum.at[m], scale) : 0.0f;
  }
  store(dk + at, x);
}

// Channels to symbols, [B, T, C] -> [B, R, T] bytes. Grid: (ceil(T / 32), ceil(R / 32), B).
extern "C" __global__ void __launch_bounds__(256)
pack(const Scalar* __restrict__ x, u8* __restrict__ symbols, u32 T, u32 R) {
  u8* tile = shared_memory();  // [32 routes][36]
  const u32 t0 = blockIdx.x * 32, r0 = blockIdx.y * 32, lane = threadIdx.x % 32;
  const size_t row = (size_t)blockIdx.z * T;
  for (u32 i = threadIdx.x / 32; i < 32; i += blockDim.x / 32) {
    if (t0 + i >= T || r0 + lane >= R) continue;
    float in[M];
    load(x + ((row + t0 + i) * R + r0 + lane) * M, in);
    u32 symbol = 0;
#pragma unroll
    for (int m = 0; m < M; ++m) symbol |= (u32)(in[m] > 0.0f) << m;
    tile[lane * 36 + i] = (u8)symbol;
  }
  __syncthreads();
  for (u32 i = threadIdx.x / 32; i < 32; i += blockDim.x / 32) {
    if (r0 + i < R && t0 + lane < T) {
      symbols[row * R + (size_t)(r0 + i) * T + t0 + lane] = tile[i * 36 + lane];
    }
  }
}
