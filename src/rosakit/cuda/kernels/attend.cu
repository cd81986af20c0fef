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
// divided among; BACKWARD which kernel is meant.
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

#if !BACKWARD
__device__ __forceinline__ float worst(const float (&x)[P]) {
  float most = x[0];
#pragma unroll
  for (int p = 1; p < P; ++p) most = fmaxf(most, x[p]);
  return most;
}

struct Forward {
  const float *q, *k, *w;
  const int* starts;
  float *top, *sum, *out;
  int lane, d0, d;
  u32 stream;
  Numbers n;
};

constexpr int ROWS = 32 / (V + 1) < P ? 32 / (V + 1) : P;  // rows whose sums are reduced at once
constexpr int CHUNK = ROWS >= 4 ? 4 : ROWS >= 2 ? 2 : 1;
constexpr int SUMS = CHUNK * (V + 1);

// P rows from i on: (i - d0) % P = 0. Statistics are relative to `top`, which stays where it is
// unless a logit exceeds it by MARGIN.
template <bool FULL>
__device__ __forceinline__ void forward_rows(const Forward& f, int i, float (&t)[P], float (&c)[P],
                                             float (&keys)[P][M], float (&old)[P][M],
                                             float (&values)[P][V]) {
  const Numbers& n = f.n;
#pragma unroll
  for (int first = 0; first < P; first += CHUNK) {
    float sums[SUMS];
    float shrink[CHUNK];
    if (i + first >= n.length) return;
#pragma unroll
    for (int u = first; u < first + CHUNK; ++u) {
      const int place = i + u < n.T ? i + u : n.T - 1;
      const Row row = row_at(i + u, f.starts, n);
      fetch_key(keys[u & (P - 1)], f.k, i + u - f.d0, f.lane, n.T);
      fetch_key(values[u & (P - 1)], f.w, i + u - f.d0 + OFFSET, f.lane, n.T);
      float query[M], earlier[M];
      fetch(query, f.q + (i64)place * M);
      if (WINDOWED) {
        fetch_key(old[u & (P - 1)], f.k, i + u - n.window - f.d0, f.lane, n.T);
        fetch(earlier, f.q + (i64)inside(i + u - n.window, n.T) * M);
      }
      float z[P];
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const int d = f.d + p, slot = (u - p) & (P - 1);
        const float leaving = WINDOWED ? dot(earlier, old[slot]) : 0.0f;
        advance<FULL>(dot(query, keys[slot]), leaving, row, d, t[p], c[p], n);
        z[p] = logit(SCAN ? t[p] - c[p] : t[p], row, (float)d, n);
        if (!FULL && d > row.reach) z[p] = -1.0e38f;
      }
      float top = f.top[place];
      shrink[u - first] = 1.0f;
      float most = worst(z);
      if (__ballot_sync(FULL_MASK, most > top + MARGIN)) {
#pragma unroll
        for (int bit = 16; bit; bit /= 2)
          most = fmaxf(most, __shfl_xor_sync(FULL_MASK, most, bit));
        shrink[u - first] = power(top - most);
        top = most;
        if (f.lane == 0) f.top[place] = most;
      }
      float* line = sums + (u - first) * (V + 1);
#pragma unroll
      for (int v = 0; v <= V; ++v) line[v] = 0.0f;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        float weight = power(z[p] - top);
        line[0] += weight;
        if (DROPOUT) weight *= keep_factor(f.stream, i + u, i + u - f.d - p, n);
#pragma unroll
        for (int v = 0; v < V; ++v) line[v + 1] += weight * values[(u - p) & (P - 1)][v];
      }
    }
    const float total = spread_sum<SUMS>(sums, f.lane);
    const int slot = slot_of<SUMS>(f.lane);
    const int u = slot / (V + 1), field = slot % (V + 1);
    if (slot >= 0 && i + first + u < n.length) {
      float factor = shrink[0];
#pragma unroll
      for (int h = 1; h < CHUNK; ++h) factor = u == h ? shrink[h] : factor;
      const i64 place = i + first + u;
      float* at = field ? f.out + place * V + field - 1 : f.sum + place;
      *at = *at * factor + total;
    }
  }
}

// Softmax statistics of every row over this worker's strips. top, sum [H, W, T], out [H, W, T, V];
// they come in as any reference logit, 0 and 0.
extern "C" __global__ void __launch_bounds__(32, RESIDENT)
    attend_forward(const float* q, const float* k, const float* w, const int* starts,
                   const i64* seed, float* top, float* sum, float* out, int T, int length,
                   int routes, int workers, int window, float slope, float bias, float sharp,
                   float cap, float peak, u32 threshold, float inverse) {
  const i64 program = blockIdx.x;
  const i64 stream = program / workers;
  const int worker = (int)(program % workers);
  Forward f;
  f.n = {T, length, routes, workers, window, slope, bias, sharp, cap, peak, inverse, threshold, 0};
  if (DROPOUT) f.n.seed = (u32)*seed;
  f.q = q + stream * T * M, f.k = k + stream * T * M, f.w = w + stream * T * V;
  f.starts = PACKED ? starts + stream / routes * T : starts;
  f.top = top + program * T, f.sum = sum + program * T, f.out = out + program * T * V;
  f.lane = threadIdx.x & 31;
  f.stream = (u32)stream;
  const int strips = (length - OFFSET + 32 * P - 1) / (32 * P);
  const int turns = (strips + workers - 1) / workers;
  for (int turn = 0; turn < turns; ++turn) {
    f.d0 = OFFSET + strip_of(turn, worker, workers) * 32 * P;
    f.d = f.d0 + f.lane * P;
    float t[P], c[P], keys[P][M], old[P][M], values[P][V];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      t[p] = c[p] = 0.0f;
      fetch_key(keys[p], f.k, 0, f.lane, T);  // finite, and weighs nothing before it is replaced
      if (WINDOWED) fetch_key(old[p], f.k, 0, f.lane, T);
      fetch_key(values[p], f.w, 0, f.lane, T);
    }
    for (int i = f.d0; i < length; i += P) {
      if (!PACKED && i >= f.d0 + 32 * P + window && i + P <= length)
        forward_rows<true>(f, i, t, c, keys, old, values);
      else
        forward_rows<false>(f, i, t, c, keys, old, values);
    }
    __syncwarp();
  }
}

#else
struct Backward {
  const float *q, *k, *w, *g, *lse, *delta;
  const int* starts;
  float *dq, *dk, *dw;
  float* done;  // shared: what has left the window, [HELD, M + V]
  float* ring;  // WINDOWED: r_n of the last `window` rows, [window, P, 32]
  int lane, d0, d;
  u32 stream;
  Numbers n;
};

// The keys that row i + U finds in its window, but for the newest.
template <int U>
__device__ __forceinline__ void fill(const Backward& b, int i, float (&keys)[P][M],
                                     float (&old)[P][M]) {
#pragma unroll
  for (int p = 1; p < P; ++p) {
    const int r = i + U - p - b.d0;
    fetch_key(keys[(U - p) & (P - 1)], b.k, r, b.lane, b.n.T);
    if (WINDOWED) fetch_key(old[(U - p) & (P - 1)], b.k, r - b.n.window, b.lane, b.n.T);
  }
}

// Rows i + U .. i + U + COUNT - 1, states only; (i - d0) % GROUP = 0. FILL: refill the keys.
template <bool FULL, bool FILL, int U, int COUNT>
__device__ __forceinline__ void march(const Backward& b, int i, float (&t)[P], float (&c)[P],
                                      float (&keys)[P][M], float (&old)[P][M]) {
  if (FILL) fill<U>(b, i, keys, old);
#pragma unroll
  for (int u = U; u < U + COUNT; ++u) {
    const Row row = row_at(i + u, b.starts, b.n);
    fetch_key(keys[u & (P - 1)], b.k, i + u - b.d0, b.lane, b.n.T);
    float query[M], earlier[M];
    fetch(query, b.q + (i64)inside(i + u, b.n.T) * M);
    if (WINDOWED) {
      fetch_key(old[u & (P - 1)], b.k, i + u - b.n.window - b.d0, b.lane, b.n.T);
      fetch(earlier, b.q + (i64)inside(i + u - b.n.window, b.n.T) * M);
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int slot = (u - p) & (P - 1);
      const float leaving = WINDOWED ? dot(earlier, old[slot]) : 0.0f;
      advance<FULL>(dot(query, keys[slot]), leaving, row, b.d + p, t[p], c[p], b.n);
    }
  }
}

// Adds what has left the window, HELD keys from key `first` on, to dk and dw.
__device__ __forceinline__ void flush(const Backward& b, int first, int count) {
  __syncwarp();
  for (int index = b.lane; index < count * (M + V); index += 32) {
    const int key = first + index / (M + V), field = index % (M + V);
    if (key >= 0) {
      float* at = field < M ? b.dk + (i64)key * M + field
                            : b.dw + (i64)(key + OFFSET) * V + (field - M);
      *at += b.done[index];
    }
  }
  __syncwarp();
}

// Whether row i + window, of the same segment, was met on the way up.
__device__ __forceinline__ bool was_met(const Backward& b, int i) {
  const int below = i + b.n.window;
  return below < b.n.length && (!PACKED || b.starts[below] == b.starts[i]);
}

// What leaves the window at rows i .. i + HELD - 1, asked for together and before it is needed. Of
// a window of fewer rows some is not written yet: `backward_rows` asks for that itself.
__device__ __forceinline__ void fetch_gone(const Backward& b, int i, int ring_row,
                                           float (&gone)[HELD][P]) {
  if (b.n.window < HELD) return;
#pragma unroll
  for (int h = HELD - 1; h >= 0; --h) {
    ring_row = (ring_row ? ring_row : b.n.window) - 1;
    const bool met = was_met(b, i + h);
#pragma unroll
    for (int p = 0; p < P; ++p) gone[h][p] = met ? b.ring[(ring_row * P + p) * 32 + b.lane] : 0.0f;
  }
}

constexpr int BACK_ROWS = 32 / M < HELD ? 32 / M : HELD;  // rows whose dq is reduced at once

// Rows i + U + HELD - 1 down to i + U from the state t, c before them.
template <bool FULL, bool FILL, int U>
__device__ __forceinline__ void backward_rows(const Backward& b, int i, float (&t)[P],
                                              float (&c)[P], float (&ta)[P], float (&ca)[P],
                                              float (&keys)[P][M], float (&old)[P][M],
                                              float (&values)[P][V], float (&dk)[P][M],
                                              float (&dw)[P][V], int& ring_row) {
  const Numbers& n = b.n;
  float a_held[HELD][P], t_held[HELD][P], c_held[HELD + 1][P], t_before[P];
#pragma unroll
  for (int p = 0; p < P; ++p) t_before[p] = t[p], c_held[0][p] = c[p];
  if (FILL) fill<U>(b, i, keys, old);
  float gone[HELD][P];
#pragma unroll
  for (int h = 0; h < HELD; ++h) {
    const int u = U + h;
    const Row row = row_at(i + u, b.starts, n);
    fetch_key(keys[u & (P - 1)], b.k, i + u - b.d0, b.lane, n.T);
    float query[M], earlier[M];
    fetch(query, b.q + (i64)inside(i + u, n.T) * M);
    if (WINDOWED) {
      fetch_key(old[u & (P - 1)], b.k, i + u - n.window - b.d0, b.lane, n.T);
      fetch(earlier, b.q + (i64)inside(i + u - n.window, n.T) * M);
    }
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int slot = (u - p) & (P - 1);
      const float leaving = WINDOWED ? dot(earlier, old[slot]) : 0.0f;
      a_held[h][p] = advance<FULL>(dot(query, keys[slot]), leaving, row, b.d + p, t[p], c[p], n);
      t_held[h][p] = t[p], c_held[h + 1][p] = c[p];
    }
  }
  if (WINDOWED) fetch_gone(b, i + U, ring_row, gone);
  float row_sums[BACK_ROWS * M];
#pragma unroll
  for (int h = HELD - 1; h >= 0; --h) {
    const int u = U + h;
    const int place = inside(i + u, n.T);
    const Row row = row_at(i + u, b.starts, n);
    float query[M], g[V];
    fetch(query, b.q + (i64)place * M);
    fetch(g, b.g + (i64)place * V);
    const float lse = b.lse[place], delta = b.delta[place];
    if (WINDOWED) ring_row = (ring_row ? ring_row : n.window) - 1;
    float* sums = row_sums + h % BACK_ROWS * M;
#pragma unroll
    for (int m = 0; m < M; ++m) sums[m] = 0.0f;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int d = b.d + p, slot = (u - p) & (P - 1);
      const bool valid = FULL || d <= row.reach;
      const float a = a_held[h][p], state = t_held[h][p];
      const float x = SCAN ? state - c_held[h + 1][p] : state;
      float weight = power(logit(x, row, (float)d, n) - lse);
      if (!valid) weight = 0.0f;
      float gw = dot(g, values[slot]);
      float kept = weight;
      if (DROPOUT) {
        const float keep = keep_factor(b.stream, i + u, i + u - d, n);
        kept *= keep, gw *= keep;
      }
      float gx = weight * (gw - delta);
      if (UTILITY)
        gx *= 0.5f * n.sharp * inverse_root(1.0f + x);
      else
        gx *= CAPPED && x > n.cap ? 0.0f : n.sharp;
      float da;
      float dt = gx + ta[p];
      if (SCAN) {
        const float dc = ca[p] - gx;
        float before = c_held[h][p];
        if (!FULL && OFFSET == 0 && d >= row.reach) before = 0.0f;
        if (!FULL && PACKED && d > row.reach) before = 0.0f;
        const bool newest = state * (1.0f - a) >= before;
        const float dtop = newest ? dc : 0.0f;
        dt += dtop * (1.0f - a);
        da = dt - dtop * state;
        ta[p] = dt;
        ca[p] = newest ? 0.0f : dc;
      } else if (WINDOWED) {
        float* ring = b.ring + (ring_row * P + p) * 32 + b.lane;
        if (n.window < HELD) gone[h][p] = was_met(b, i + u) ? *ring : 0.0f;
        const bool whole = FULL || d + n.window - 1 <= row.reach;
        const float r = whole ? ta[p] * window_product(c_held[h + 1][p], n) : 0.0f;
        *ring = r;
        ca[p] += r - gone[h][p];
        da = dt * state - ca[p];  // of log a
        ta[p] = dt * a;
      } else {
        float before = h ? t_held[h ? h - 1 : 0][p] : t_before[p];
        if (!FULL && OFFSET == 0 && d >= row.reach) before = 0.0f;
        da = dt * (before + 1.0f);
        ta[p] = dt * a;
      }
      float ds = da * n.slope;
      if (GATE == 0) ds *= a * (1.0f - a);
      if (GATE == 2 && !WINDOWED) ds *= a;
      if (!FULL) {
        if (!valid) ds = 0.0f;
        const bool goes_on = OFFSET == 0 ? d < row.reach : d <= row.reach;
        if (!goes_on && (OFFSET == 0 || PACKED)) ta[p] = ca[p] = 0.0f;
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        sums[m] += ds * keys[slot][m];
        dk[slot][m] += ds * query[m];
      }
#pragma unroll
      for (int v = 0; v < V; ++v) dw[slot][v] += kept * g[v];
    }
    // The window moves to the row before: the key at lane 0's end is complete.
    const int leaves = u & (P - 1);
    if (b.lane == 0) {
#pragma unroll
      for (int m = 0; m < M; ++m) b.done[h * (M + V) + m] = dk[leaves][m];
#pragma unroll
      for (int v = 0; v < V; ++v) b.done[h * (M + V) + M + v] = dw[leaves][v];
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float next = __shfl_down_sync(FULL_MASK, dk[leaves][m], 1);
      dk[leaves][m] = b.lane == 31 ? 0.0f : next;
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float next = __shfl_down_sync(FULL_MASK, dw[leaves][v], 1);
      dw[leaves][v] = b.lane == 31 ? 0.0f : next;
    }
    fetch_key(values[leaves], b.w, i + u - P - b.d0 + OFFSET, b.lane, n.T);
    if (h) fetch_key(keys[leaves], b.k, i + u - P - b.d0, b.lane, n.T);
    if (h % BACK_ROWS == 0) {
      const float total = spread_sum<BACK_ROWS * M>(row_sums, b.lane);
      const int slot = slot_of<BACK_ROWS * M>(b.lane);
      const i64 at = i + u;  // the first of BACK_ROWS rows
      if (slot >= 0 && at + slot / M < n.length) b.dq[at * M + slot] += total;
    }
  }
  flush(b, i + U - b.d0, HELD);
}

// Gradients of q, k [H, W, T, M] and w [H, W, T, V], summed over this worker's strips; they come in
// as zeros. A strip is marched down once, leaving its state every GROUP rows in `marks`; then the
// groups go up, each in two halves of HELD rows that are marched again and held in registers.
extern "C" __global__ void __launch_bounds__(32, RESIDENT)
    attend_backward(const float* q, const float* k, const float* w, const float* g,
                    const float* lse, const float* delta, const int* starts, const i64* seed,
                    float* dq, float* dk, float* dw, float* marks, float* ring, int T, int length,
                    int routes, int workers, int window, float slope, float bias, float sharp,
                    float cap, float peak, u32 threshold, float inverse) {
  SHARED_FLOATS(done);
  const i64 program = blockIdx.x;
  const i64 stream = program / workers;
  const int worker = (int)(program % workers);
  Backward b;
  b.n = {T, length, routes, workers, window, slope, bias, sharp, cap, peak, inverse, threshold, 0};
  if (DROPOUT) b.n.seed = (u32)*seed;
  b.q = q + stream * T * M, b.k = k + stream * T * M, b.w = w + stream * T * V;
  b.g = g + stream * T * V, b.lse = lse + stream * T, b.delta = delta + stream * T;
  b.starts = PACKED ? starts + stream / routes * T : starts;
  b.dq = dq + program * T * M, b.dk = dk + program * T * M, b.dw = dw + program * T * V;
  b.done = done;
  b.ring = ring + program * window * P * 32;
  b.lane = threadIdx.x & 31;
  b.stream = (u32)stream;
  constexpr int STATES = SCAN || WINDOWED ? 2 * P : P;
  float* mine = marks + (program * (T / GROUP + 1) * 32 + b.lane) * STATES;
  const int strips = (length - OFFSET + 32 * P - 1) / (32 * P);
  const int turns = (strips + workers - 1) / workers;
  for (int turn = 0; turn < turns; ++turn) {
    b.d0 = OFFSET + strip_of(turn, worker, workers) * 32 * P;
    b.d = b.d0 + b.lane * P;
    const int groups = (length - b.d0 + GROUP - 1) / GROUP;
    if (groups <= 0) continue;
    float t[P], c[P], keys[P][M], old[P][M], values[P][V];
#pragma unroll
    for (int p = 0; p < P; ++p) t[p] = c[p] = 0.0f;
    fill<0>(b, b.d0, keys, old);
    for (int group = 0; group < groups; ++group) {
      float* mark = mine + (i64)group * 32 * STATES;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        mark[p] = t[p];
        if (STATES > P) mark[P + p] = c[p];
      }
      const int i = b.d0 + group * GROUP;
      if (!PACKED && i >= b.d0 + 32 * P + window && i + GROUP <= length)
        march<true, false, 0, GROUP>(b, i, t, c, keys, old);
      else
        march<false, false, 0, GROUP>(b, i, t, c, keys, old);
    }
    float ta[P], ca[P], dk_window[P][M], dw_window[P][V];
    int ring_row = 0;
    const int end = groups * GROUP - 1;
#pragma unroll
    for (int p = 0; p < P; ++p) {
      ta[p] = ca[p] = 0.0f;
      fetch_key(values[(GROUP - 1 - p) & (P - 1)], b.w, end - p + OFFSET, b.lane, T);
#pragma unroll
      for (int m = 0; m < M; ++m) dk_window[p][m] = 0.0f;
#pragma unroll
      for (int v = 0; v < V; ++v) dw_window[p][v] = 0.0f;
    }
    for (int group = groups - 1; group >= 0; --group) {
      const float* mark = mine + (i64)group * 32 * STATES;
      const int i = b.d0 + group * GROUP;
      const bool full = !PACKED && i >= b.d0 + 32 * P + window && i + GROUP <= length;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        t[p] = mark[p];
        c[p] = STATES > P ? mark[P + p] : 0.0f;
      }
      if (full) {
        march<true, true, 0, HELD>(b, i, t, c, keys, old);
        backward_rows<true, false, HELD>(b, i, t, c, ta, ca, keys, old, values, dk_window,
                                         dw_window, ring_row);
      } else {
        march<false, true, 0, HELD>(b, i, t, c, keys, old);
        backward_rows<false, false, HELD>(b, i, t, c, ta, ca, keys, old, values, dk_window,
                                          dw_window, ring_row);
      }
#pragma unroll
      for (int p = 0; p < P; ++p) {
        t[p] = mark[p];
        c[p] = STATES > P ? mark[P + p] : 0.0f;
      }
      if (full)
        backward_rows<true, true, 0>(b, i, t, c, ta, ca, keys, old, values, dk_window, dw_window,
                                     ring_row);
      else
        backward_rows<false, true, 0>(b, i, t, c, ta, ca, keys, old, values, dk_window,
                                     dw_window, ring_row);
    }
    __syncwarp();
  }
}
#endif
