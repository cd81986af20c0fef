// Exact single-bit finite differences of whole streams: all flips in one quadratic sweep.
//
// The method is that of the CPU core (cpp/src/bitflip.cpp and bitflip_tied.cpp, in words in
// docs/estimators/bitflip.md); here a thread block sweeps one stream row by row, its threads over
// the keys of the row:
//   1. carry l = lcs(i, j) and the lengths after a mend along the diagonals; find the winner,
//   2. scatter the mended matches by the flip that mends them, the others by where they can break,
//   3. running maxima over the scattered, so that the best that a flip leaves is a look-up,
//   4. settle the flips that touch the winner, and those whose mended match beats it.
// Sums are double and a flip gets one term a row, in the order and rounding of the CPU core.
//
// Compile-time: M (bits, 1..8), TIED (1: q and k are one stream whose flip shows in both), THREADS,
// WIDE (1: gradients are double, else float), PLACES (bit n: array n is in shared memory).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#if WIDE
typedef double Real;
#else
typedef float Real;
#endif

#define WARPS (THREADS / 32)
#define ALL 0xffffffffu

// A candidate as one number: longer is larger, then later. 0 is the null.
__device__ __forceinline__ u32 key(u32 length, u32 end) {
  return length ? length << 16 | (end + 1) : 0u;
}
__device__ __forceinline__ u32 most(u32 a, u32 b) { return a > b ? a : b; }
__device__ __forceinline__ u32 least(u32 a, u32 b) { return a < b ? a : b; }

// Takes arrays out of shared memory or out of this block's scratch.
struct Carver {
  u8 *shared, *scratch;
  template <typename T> __device__ T* take(bool in_shared, u32 count) {
    u8*& from = in_shared ? shared : scratch;
    T* array = (T*)from;
    from += ((size_t)count * sizeof(T) + 15) / 16 * 16;
    return array;
  }
};

// What one row reads, as the loss sees it.
struct Row {
  double base, null, step[M];
};

__device__ __forceinline__ double value(const Row& row, u32 x) {
  double sum = row.base;
#pragma unroll
  for (int m = M - 1; m >= 0; --m)
    if (x >> m & 1) sum = __dadd_rn(sum, row.step[m]);
  return sum;
}

__device__ __forceinline__ u32 warp_max(u32 x) {
  for (int with = 16; with; with >>= 1) x = most(x, __shfl_xor_sync(ALL, x, with));
  return x;
}

// The largest x of the block. `slots` is free again after the next barrier.
__device__ u32 block_max(u32 x, u32* slots) {
  const u32 lane = threadIdx.x % 32;
  x = warp_max(x);
  if (lane == 0) slots[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_max(lane < WARPS ? slots[lane] : 0u);
}

// For each of four values: the largest of the threads before this one.
__device__ void scan_before(u32 x[4], u32* slots) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    for (u32 by = 1; by < 32; by *= 2) {
      const u32 other = __shfl_up_sync(ALL, x[a], by);
      if (lane >= by) x[a] = most(x[a], other);
    }
    if (lane == 31) slots[a * 32 + warp] = x[a];
    const u32 previous = __shfl_up_sync(ALL, x[a], 1);
    x[a] = lane ? previous : 0u;
  }
  __syncthreads();
#pragma unroll
  for (int a = 0; a < 4; ++a)
    x[a] = most(x[a], warp_max(lane < warp ? slots[a * 32 + lane] : 0u));
}

extern "C" __global__ void __launch_bounds__(THREADS)
bitflip(const u8* __restrict__ q_all, const u8* __restrict__ k_all, const u8* __restrict__ v_all,
        const int* __restrict__ segments, const Real* __restrict__ grad,
        const double* __restrict__ e0, const double* __restrict__ e1,
        const double* __restrict__ e_null, Real* __restrict__ out_q, Real* __restrict__ out_k,
        u8* scratch, size_t scratch_stride, u32 streams, u32 routes, u32 T, u32 max_length,
        u32 min_length, u32 unmatched_self, u32 flip_values) {
#ifdef ROSAKIT_EMULATE
  u8* shared = emulated_shared();
#else
  extern __shared__ __align__(16) u8 shared[];
#endif
  Carver carve{shared, scratch + blockIdx.x * scratch_stride};
  Row& row = *carve.take<Row>(true, 1);
  u32* slots = carve.take<u32>(true, 5 * 32);
#define IN_SHARED(n) ((PLACES >> n) & 1)
  u16* run = carve.take<u16>(IN_SHARED(0), T);         // l, by distance i - j - 1
  u16* by_query = carve.take<u16>(IN_SHARED(0), T);    // mended on the query side
  u16* by_key = carve.take<u16>(IN_SHARED(0), TIED ? T : 0);  // on the key side, where that differs
  u8* mend = carve.take<u8>(IN_SHARED(0), T);          // the bit that mends, 0 if more than one
  u32* latest = carve.take<u32>(IN_SHARED(1), T);
  u32* by_start = carve.take<u32>(IN_SHARED(2), T);
  u32* cover = carve.take<u32>(IN_SHARED(3), T);
  u32* prefix = carve.take<u32>(IN_SHARED(4), T);
  u8* q = carve.take<u8>(IN_SHARED(5), T);
  u8* k = TIED ? q : carve.take<u8>(IN_SHARED(5), T);
  u8* v = carve.take<u8>(IN_SHARED(5), T);
  u32* gain_q = carve.take<u32>(IN_SHARED(6), T * M);
  u32* gain_k = TIED ? gain_q : carve.take<u32>(IN_SHARED(6), T * M);
  double* credit_q = carve.take<double>(IN_SHARED(7), T * M);
  double* credit_k = TIED ? credit_q : carve.take<double>(IN_SHARED(7), T * M);
  const u32 t = threadIdx.x, channels = routes * M;

  for (u32 stream = blockIdx.x; stream < streams; stream += gridDim.x) {
    const u32 route = stream % routes, sample = stream / routes;
    const size_t first = (size_t)sample * T * channels + route * M;  // of grad and of the credits
    __syncthreads();  // the stream before has been written
    for (u32 n = t; n < T; n += THREADS) {
      q[n] = q_all[(size_t)stream * T + n];
      if (!TIED) k[n] = k_all[(size_t)stream * T + n];
      v[n] = v_all[(size_t)stream * T + n];
    }
    for (u32 n = t; n < T * M; n += THREADS) {
      gain_q[n] = gain_k[n] = 0;
      credit_q[n] = credit_k[n] = 0.0;
    }
    double g[M];
    if (t == 0)
      for (int m = 0; m < M; ++m) g[m] = grad[first + m];

    for (u32 i = 0; i < T; ++i) {
      __syncthreads();  // the row before has been settled
      if (t == 0) {
        double base = 0.0, null = 0.0;
        for (int m = 0; m < M; ++m) {
          const u32 c = route * M + m;
          base = __dadd_rn(base, __dmul_rn(g[m], e0[c]));
          row.step[m] = __dmul_rn(g[m], __dadd_rn(e1[c], -e0[c]));
          if (e_null) null = __dadd_rn(null, __dmul_rn(g[m], e_null[c]));
          if (i + 1 < T) g[m] = grad[first + (size_t)(i + 1) * channels + m];  // in time for its row
        }
        row.base = base;
        row.null = null;
      }
      const int segment = segments ? segments[(size_t)sample * T + i] : 0;
      const u32 begin = segment < 0 ? i : (u32)segment, n = i - begin;  // keys begin..i - 1
      const u32 here = q[i];

      // 1. The diagonals move on.
      u32 winner = 0;
      for (u32 c = t; c < n; c += THREADS) {
        const u32 j = i - 1 - c, distance = c + 1, differs = here ^ k[j];
        const bool fresh = j == begin;
        const u32 before = fresh ? 0u : run[c], old = fresh ? 0u : mend[c];
        const u32 queried = fresh ? 1u : by_query[c] + 1u;
        const u32 more = before + 1;
        if (differs == 0) {
          run[c] = (u16)more;
          mend[c] = (u8)old;
          by_query[c] = (u16)queried;
#if TIED
          by_key[c] = (u16)(fresh ? 1u : by_key[c] + 1u);
#endif
        } else {
          const u32 one = differs & (differs - 1) ? 0u : differs;
          run[c] = 0;
          mend[c] = (u8)one;
          by_query[c] = (u16)more;
#if TIED
          // The mended match ends where it meets x[u] again, as query - unless the next mismatch
          // is there and the flip mends it as well.
          const bool twice = more == distance && one && one == old;
          by_key[c] = (u16)(twice ? queried : least(more, distance));
#endif
        }
        const u32 found = key(least(run[c], max_length), j);
        winner = most(winner, found);
        prefix[j] = found;
        by_start[j] = cover[j] = latest[c] = 0;
      }
      winner = block_max(winner, slots);
      const u32 length = winner >> 16, end = (winner & 0xffffu) - 1;
      // Flips that can change what the winner reads: its keys (and what it reads), its queries.
      const u32 low = length ? end + 1 - length : i + 1;
      const u32 high = length ? (TIED ? end + 1 : end) : i;
      const u32 queries = length ? i + 1 - length : TIED && unmatched_self ? i : i + 1;
#if TIED
#define TOUCHES_QUERY(u) ((u) >= queries || ((u) >= low && (u) <= high))
#define TOUCHES_KEY(u) TOUCHES_QUERY(u)
#else
#define TOUCHES_QUERY(u) ((u) >= queries)
#define TOUCHES_KEY(u) ((u) >= low && (u) <= high)
#endif

      // 2. Mended matches by flip; the others by where they break.
      for (u32 c = t; c < n; c += THREADS) {
        const u32 j = i - 1 - c, l = run[c], one = mend[c];
        if (one) {
          const u32 m = 31 - __clz(one);
          const u32 mended = key(least(TIED ? by_key[c] : by_query[c], max_length), j);
          if (m < M && (mended > winner || TOUCHES_KEY(j - l)))
            atomicMax(&gain_k[(j - l) * M + m], mended);
          const u32 queried = key(least(by_query[c], max_length), j);
          if (m < M && (!TIED || l <= c) && (queried > winner || TOUCHES_QUERY(i - l)))
            atomicMax(&gain_q[(i - l) * M + m], queried);
        }
        if (length && l) {
          // A flip of query i - s leaves s of a match that is longer; if tied, of keys before it.
          const u32 left = least(l, length - 1);
          atomicMax(&latest[TIED ? least(left, c) : left], j + 1);
          const u32 start = j - l + 1;  // kept one late: matches that start at 0
          atomicMax(&by_start[start], key(least(l, max_length), j));
          atomicMax(&cover[start], j + 1);
        }
      }

      // 3. Running maxima: in the order of keys for prefix and cover, against it for the others.
      if (length) {
        __syncthreads();
        const u32 each = (n + THREADS - 1) / THREADS;
        const u32 from = least(t * each, n), to = least(from + each, n);
        u32 best[4] = {0, 0, 0, 0};
        for (u32 e = from; e < to; ++e) {
          best[0] = most(best[0], prefix[begin + e]);
          best[1] = most(best[1], cover[begin + e]);
          best[2] = most(best[2], by_start[i - 1 - e]);
          if (e < length) best[3] = most(best[3], latest[length - 1 - e]);
        }
        scan_before(best, slots + 32);
        for (u32 e = from; e < to; ++e) {
          const u32 here_best = prefix[begin + e];
          prefix[begin + e] = best[0];  // of the keys before
          best[0] = most(best[0], here_best);
          best[1] = most(best[1], cover[begin + e]);
          cover[begin + e] = best[1];  // the latest match with its first key here or before
          best[2] = most(best[2], by_start[i - 1 - e]);
          by_start[i - 1 - e] = best[2];  // the best match with its first key here or later
          if (e < length) {
            best[3] = most(best[3], latest[length - 1 - e]);
            latest[length - 1 - e] = best[3];
          }
        }
      }
      __syncthreads();

      // 4. Settle.
      const auto read = [&](u32 best, u32 u, u32 bit) {
        const bool found = best && (best >> 16) >= min_length;
        if (!found && !unmatched_self) return row.null;
        const u32 at = found ? best & 0xffffu : i;
        return value(row, flip_values && at == u ? v[at] ^ bit : v[at]);
      };
      const double now = read(winner, T, 0);
      const auto settle = [&](double* credit, u32 u, u32 m, u32 best) {
        double& sum = credit[u * M + m];
        sum = __dadd_rn(sum, __dadd_rn(read(best, u, 1u << m), -now));
      };
      const auto broken = [&](u32 u) {  // the best of the matches with keys at u or after it
        u32 best = u + 1 < i ? by_start[u + 1] : 0u;
        const u32 through = cover[u];
        if (through > u + 1) best = most(best, key(least(through - 1 - u, max_length), through - 1));
        return best;
      };
      const u32 of_queries = i + 1 - queries, of_keys = length ? high + 1 - low : 0u;
      for (u32 z = t; z < (of_queries + of_keys) * M; z += THREADS) {
        const u32 place = z / M, m = z % M;
        const bool as_query = place < of_queries;
        const u32 u = as_query ? i - place : low + (place - of_queries), s = i - u;
        u32 best;
#if TIED
        if (!as_query && u >= queries) continue;
        best = 0;
        if (u < i) {
          best = as_query && latest[s] ? key(s, latest[s] - 1) : prefix[u];
          best = most(best, broken(u));
        }
#else
        if (as_query)
          best = s ? key(s, latest[s] - 1) : 0u;
        else
          best = most(prefix[u], broken(u));
#endif
        u32* gain = (as_query ? gain_q : gain_k) + u * M + m;
        settle(as_query ? credit_q : credit_k, u, m, most(best, *gain));
        *gain = 0;
      }
      for (u32 c = t; c < n; c += THREADS) {
        const u32 j = i - 1 - c, l = run[c], one = mend[c];
        const u32 m = one ? 31 - __clz(one) : M;
        if (m >= M) continue;
        // Only the thread of the match that won a flip settles it.
        const u32 mended = key(least(TIED ? by_key[c] : by_query[c], max_length), j);
        if (mended > winner && !TOUCHES_KEY(j - l) && gain_k[(j - l) * M + m] == mended) {
          settle(credit_k, j - l, m, mended);
          gain_k[(j - l) * M + m] = 0;
        }
        if (TIED && l > c) continue;
        const u32 queried = key(least(by_query[c], max_length), j);
        if (queried > winner && !TOUCHES_QUERY(i - l) && gain_q[(i - l) * M + m] == queried) {
          settle(credit_q, i - l, m, queried);
          gain_q[(i - l) * M + m] = 0;
        }
      }
    }
    __syncthreads();
    for (u32 n = t; n < T * M; n += THREADS) {
      const size_t at = first + (size_t)(n / M) * channels + n % M;
      out_q[at] = (Real)credit_q[n];
      if (!TIED) out_k[at] = (Real)credit_k[n];
    }
  }
}
