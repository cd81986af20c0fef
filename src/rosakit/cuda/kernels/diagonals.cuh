// The pairwise forms (docs/estimators/fused.md): softmax over all earlier positions of soft run
// lengths, without the [T, T] matrix.
//
// A warp owns strips of 32 P neighbouring diagonals d = i - j and marches down the rows. Lane x
// holds diagonals d0 + x P + p, p < P, so that its keys j = i - d are a window of P neighbours that
// moves by one key a row: one key is loaded a row, and none crosses lanes. Keys and values come
// permuted, key j at (j mod P) * (T / P) + j / P, which makes the lanes' loads neighbours.
//
// WINDOWED: evidence of the last `window` symbols only. With cost = peak - product >= 0 and
// equality a = 2^(-rate cost), along a diagonal
//   x_n = a_n (1 + x_{n-1} - W_{n-1}),  W_n = 2^(-rate c_n),
//   c_n = c_{n-1} + cost_n - cost_{n-window}
// where W is the product of a whole window of equalities; and backwards, with u_n = dL/dx_n of this
// recurrence,
//   dL/d(log a_n) = u_n x_n - s_n,  s_n = s_{n+1} + r_n - r_{n+window},  r_n = u_{n+1} a_{n+1} W_n.
// Symbols are signs, so costs are whole numbers: `c` is exact, and along a match nothing drifts.
//
// Macros: M, V channels of q/k and of the values (1, 2 or a multiple of 4); P diagonals a lane (a
// power of two); GATE 0 sigmoid, 1 identity, 2 exp; SCAN; UTILITY; OFFSET; CAPPED; PACKED; DROPOUT;
// WINDOWED (GATE 2, OFFSET 1 and not SCAN); RESIDENT warps a multiprocessor that registers are
// divided among. The kernels are attend_forward.cu and attend_backward.cu, compiled one by one.
#ifndef ROSAKIT_EMULATE
typedef unsigned int u32;
typedef long long i64;
__device__ __forceinline__ float power(float x) {  // 2^x, tiny results 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_of(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float inverse_root(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#define SHARED_FLOATS(name) extern __shared__ float name[]
#else
typedef std::uint32_t u32;
typedef std::int64_t i64;
inline float power(float x) { return std::exp2(x); }
inline float inverse_of(float x) { return 1.0f / x; }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline float fmaxf(float a, float b) { return a > b ? a : b; }
inline float fminf(float a, float b) { return a < b ? a : b; }
inline float log2f(float x) { return std::log2(x); }
#define SHARED_FLOATS(name) float* name = reinterpret_cast<float*>(emulated_shared())
#endif

#define FULL_MASK 0xffffffffu
constexpr float LOG2E = 1.4426950408889634f;
constexpr float MARGIN = 40.0f;   // how far, in base 2, a logit may exceed the reference
constexpr int HELD = 4;           // rows held in registers on the way up
constexpr int GROUP = 2 * HELD;   // rows between marks

struct Numbers {
  int T, length, routes, workers, window;
  float slope, bias, sharp, cap, peak, inverse;  // peak: the product of equal symbols
  u32 threshold, seed;
};

template <int N>
__device__ __forceinline__ void fetch(float (&x)[N], const float* at) {
  if constexpr (N % 4 == 0) {
#pragma unroll
    for (int n = 0; n < N; n += 4) {
      const float4 y = *reinterpret_cast<const float4*>(at + n);
      x[n] = y.x, x[n + 1] = y.y, x[n + 2] = y.z, x[n + 3] = y.w;
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = at[n];
  }
}

template <int N>
__device__ __forceinline__ float dot(const float (&x)[N], const float (&y)[N]) {
  float sum = x[0] * y[0];
#pragma unroll
  for (int n = 1; n < N; ++n) sum += x[n] * y[n];
  return sum;
}

// The key that lane `lane` meets at distance r = i - d0 - p, from a permuted table.
template <int N>
__device__ __forceinline__ void fetch_key(float (&x)[N], const float* table, int r, int lane,
                                          int T) {
  // Beyond the stream's ends any finite number will do: such cells are no candidates.
  const int column = T / P, place = (r - (r & (P - 1))) / P - lane;
  fetch(x, table + (i64)((r & (P - 1)) * column + max(0, min(place, column - 1))) * N);
}

__device__ __forceinline__ u32 mix(u32 x) {
  x ^= x >> 16;
  x *= 0x85EBCA6Bu;
  x ^= x >> 13;
  x *= 0xC2B2AE35u;
  return x ^ x >> 16;
}

// 0 or 1 / (1 - dropout): the twin of pairwise.kept.
__device__ __forceinline__ float keep_factor(u32 stream, int i, int j, const Numbers& n) {
  u32 word = mix(stream ^ n.seed);
  word = mix(word + (u32)i * 0x9E3779B9u);
  word = mix(word + (u32)j * 0x85EBCA77u);
  return word >= n.threshold ? n.inverse : 0.0f;
}

// What a row's cells share.
struct Row {
  int i, start, reach;  // reach: the largest distance of a candidate, -1 for none
  float step, base;     // logits are sharp2 * x + base - d * step, or as UTILITY
};

__device__ __forceinline__ Row row_at(int i, const int* starts, const Numbers& n) {
  Row row;
  row.i = i;
  row.start = 0;
  row.reach = i < n.length ? i : -1;
  if (PACKED) {
    row.start = i < n.length ? starts[i] : -1;
    row.reach = row.start >= 0 ? i - row.start : -1;
  }
  const float seen = (float)(i - row.start);
  if (UTILITY) {
    row.step = 0.0f;
    row.base = -(n.sharp * LOG2E + log2f(fmaxf(seen, 1.0f)));
  } else {
    row.step = n.sharp * LOG2E * inverse_of(seen + 1.0f);
    row.base = seen * row.step;  // recency (seen - d) / (seen + 1)
  }
  return row;
}

// The product of the equalities in a whole window, from its costs.
__device__ __forceinline__ float window_product(float c, const Numbers& n) {
  return power((-LOG2E * n.slope) * c);
}

// Symbol equality a and the next state t, c of one diagonal. FULL: every cell of the row is a
// candidate, none is its segment's first, and so are the `window` cells before it. `leaving`: the
// product that leaves the window.
template <bool FULL>
__device__ __forceinline__ float advance(float product, float leaving, const Row& row, int d,
                                         float& t, float& c, const Numbers& n) {
  float a;
  if (WINDOWED) {
    const bool whole = FULL || d + n.window <= row.reach;  // before this cell
    const bool valid = FULL || d <= row.reach;
    a = valid ? power((-LOG2E * n.slope) * (n.peak - product)) : 0.0f;
    t = a * (t + (1.0f - (whole ? window_product(c, n) : 0.0f)));
    c = valid ? c + (n.peak - product) - (whole ? n.peak - leaving : 0.0f) : 0.0f;
    return a;
  }
  if (GATE == 0)
    a = inverse_of(1.0f + power(product * (-LOG2E * n.slope) - LOG2E * n.bias));
  else if (GATE == 2)
    a = power(product * (LOG2E * n.slope) + LOG2E * n.bias);
  else
    a = n.slope * product + n.bias;
  if (!FULL) {
    a = d <= row.reach ? a : 0.0f;
    if (OFFSET == 0 && d >= row.reach) t = c = 0.0f;
  }
  if (SCAN) {
    t += a;
    if (!FULL && PACKED && d > row.reach) t = c = 0.0f;
    c = fmaxf(t * (1.0f - a), c);
  } else {
    t = a * (t + 1.0f);
  }
  return a;
}

__device__ __forceinline__ float logit(float x, const Row& row, float far, const Numbers& n) {
  if (UTILITY)  // sqrt(1 + x)
    return (n.sharp * LOG2E) * ((1.0f + x) * inverse_root(1.0f + x)) + row.base;
  if (CAPPED) x = fminf(x, n.cap);
  return (n.sharp * LOG2E) * x + (row.base - far * row.step);
}

__device__ __forceinline__ int inside(int i, int T) { return i < 0 ? 0 : i < T ? i : T - 1; }

// Sums N values over the lanes; lane x is left with the sum of value `slot_of<N>(x)`.
template <int N, int BIT = 16>
__device__ __forceinline__ float spread_sum(float (&x)[N], int lane) {
  if constexpr (BIT == 0) {
    static_assert(N == 1);
    return x[0];
  } else {
    constexpr int HALF = (N + 1) / 2;
    const bool upper = lane & BIT;
    float y[HALF];
#pragma unroll
    for (int h = 0; h < HALF; ++h) {
      const float high = h + HALF < N ? x[h + HALF] : 0.0f;
      const float other = __shfl_xor_sync(FULL_MASK, N > 1 && !upper ? high : x[h], BIT);
      y[h] = (N > 1 && upper ? high : x[h]) + other;
    }
    return spread_sum<HALF, BIT / 2>(y, lane);
  }
}

// Which of N values a lane is left with; -1: none, or one that another lane has as well.
template <int N, int BIT = 16>
__device__ __forceinline__ int slot_of(int lane) {
  if constexpr (BIT == 0) {
    return 0;
  } else {
    constexpr int HALF = (N + 1) / 2;
    const int slot = slot_of<HALF, BIT / 2>(lane);
    if (slot < 0 || !(lane & BIT)) return slot;
    return N > 1 && slot + HALF < N ? slot + HALF : -1;
  }
}

// Strips are dealt back and forth, so that every worker gets long and short ones.
__device__ __forceinline__ int strip_of(int turn, int worker, int workers) {
  return turn * workers + (turn & 1 ? workers - 1 - worker : worker);
}
