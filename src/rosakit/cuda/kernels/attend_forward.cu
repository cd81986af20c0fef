// Softmax statistics of the pairwise forms; diagonals.cuh is compiled in front of it.

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
