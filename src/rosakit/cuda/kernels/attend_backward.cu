// Gradients of the pairwise forms; diagonals.cuh is compiled in front of it.

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
