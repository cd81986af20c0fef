// The exact suffix match of run granularity, one thread block a route.
//
// Queries and keys are collapsed to runs. Entries and chains are those of match.cu over runs, with
// one difference: which key runs a position may use depends on the position, not on its run alone,
// so a chain keeps the range of *all* key runs of its segment, and a position takes the part of the
// range that it may see. An entry is the run after the matched one, whose start is what is read, and
// the entries of a range are in the order of time, so that part is found by bisection, and a range
// serves the position at all if its first entry does.
//
// Until the last step `position` holds entries and `length` lengths, whether reported or not.
//
// Compile-time: CF (flipped bits, 0..8), THREADS, MIN_BLOCKS, RANK_SHARED (0, 1).

constexpr u32 NONE = 0xffffffffu;
constexpr int BATCH = 4;

struct Chain { u32 a, b; };

// Where runs start, as bits, and the run of every position.
struct RunMap {
  u32* words;     // [T / 32 + 1]
  u32* before;    // starts in earlier words
  __device__ __forceinline__ bool starts(u32 i) const { return words[i >> 5] >> (i & 31) & 1; }
  __device__ __forceinline__ u32 run(u32 i) const {
    return before[i >> 5] + __popc(words[i >> 5] & ((2u << (i & 31)) - 1u)) - 1;
  }
};

struct Control {
  u32 totals[16];
  u32 warp_sums[32];
  u32 valid;          // positions with a match of the new depth
  u32 drop;           // sum over chains of log2 of how much their range shrank
  u32 next;
};

struct Runs {
  const int* segment;   // [T] or null
  int* position;        // [T]
  int* length;          // [T]
  int* flipped;         // [T][CF]
  u32 T, key_runs, query_runs, blocks;
  u32 max_length, min_length, strict;
  RunMap q_map, k_map;
  Symbols<8> q, k;      // symbols of runs
  u32* q_starts;        // [query_runs]
  u32* k_starts;        // [key_runs]
  Rank rank0, rank1;
  u32* entries;
  u32* spare;
  uint2* chains;        // by query run; empty: x == y
  u32* valid_words;     // positions that are long when the levels stop
  Control* control;
  bool two;             // whether symbols have a second digit

  // Entries that position i may see are at most this.
  __device__ __forceinline__ u32 limit(u32 i) const { return k_map.run(i) + strict; }
  __device__ __forceinline__ u32 first_key(u32 i) const {
    return segment ? k_map.run((u32)segment[i]) : 0;
  }
  __device__ __forceinline__ u32 first_query(u32 i) const {
    return segment ? q_map.run((u32)segment[i]) : 0;
  }
  __device__ __forceinline__ bool same_segment(u32 i, u32 t) const {
    if (t >= T) return false;
    return segment == nullptr || (segment[t] >= 0 && segment[t] <= (int)i);
  }
  // One past the last entry of [a, b) that is at most `most`.
  __device__ __forceinline__ u32 bisect(u32 a, u32 b, u32 most) const {
    while (a < b) {
      const u32 middle = (a + b) / 2;
      if (entries[middle] <= most) a = middle + 1; else b = middle;
    }
    return a;
  }

  __device__ __forceinline__ Chain step(Chain s, u32 x) const {
    Chain n = {rank<false>(rank0, s.a, x & 15), rank<true>(rank0, s.b - 1, x & 15)};
    if (two && n.b > n.a) {
      n = {rank<false>(rank1, n.a, x >> 4), rank<true>(rank1, n.b - 1, x >> 4)};
    }
    return two || x < 16 ? n : Chain{0, 0};
  }

  __device__ void advance(u32 d) {
    const u32 end = key_runs;
    const Symbols<8> keys = k;
    const u32* from = entries;
    u32* other = spare;
    auto load = [from, d, end](u32 p) { return d ? from[p] : min(p, end); };
    // Past the last run an entry stops at end + 1, which no position may see.
    auto on = [end](u32 e) { return e <= end ? e + 1u : e; };
    auto low = [keys](u32 e) { return keys.digit(e, 0); };
    if (two) {
      partition<BATCH, u32>(rank0, blocks, other, control->totals, load, low,
                            [](u32 e) { return e; });
      partition<BATCH, u32>(rank1, blocks, entries, control->totals,
                            [other](u32 p) { return other[p]; },
                            [keys](u32 e) { return keys.digit(e, 1); }, on);
    } else {
      partition<BATCH, u32>(rank0, blocks, other, control->totals, load, low, on);
      spare = entries;
      entries = other;
    }
  }

  // The chain that starts at query run c, before its first symbol.
  __device__ __forceinline__ Chain initial(u32 c) const {
    const u32 i = q_starts[c];
    if (segment && segment[i] < 0) return {0, 0};
    return {first_key(i), key_runs};
  }
  __device__ __forceinline__ bool chain_goes_on(u32 c, u32 t) const {
    return t < query_runs && same_segment(q_starts[c], q_starts[t]);
  }

  __device__ void step_chains(u32 d) {
    u32 drop = 0;
    for (u32 c = threadIdx.x; c < query_runs; c += blockDim.x) {
      Chain s = initial(c);
      if (d) s = {chains[c].x, chains[c].y};
      if (s.b <= s.a) {
        if (d == 0) chains[c] = make_uint2(0, 0);
        continue;
      }
      const u32 t = c + d;
      Chain n = {0, 0};
      if (chain_goes_on(c, t)) {
        const u32 x = q.at(t), i = q_starts[t];
        n = step(s, x);
        if (n.b <= n.a) n = {0, 0};
#pragma unroll 1
        for (int m = 0; m < CF; ++m) {
          const Chain f = step(s, x ^ (1u << m));
          if (f.b > f.a && entries[f.a] <= limit(i) && d + 1 >= min_length) {
            flipped[(size_t)i * CF + m] = (int)entries[bisect(f.a, f.b, limit(i)) - 1];
          }
        }
      }
      drop += 32 - __clz(s.b - s.a);
      if (n.b > n.a) drop -= 32 - __clz(n.b - n.a);
      chains[c] = make_uint2(n.a, n.b);
    }
    add_up(&control->drop, drop);
    __syncthreads();
  }

  // Matches of depth d + 1.
  __device__ void read_positions(u32 d) {
    u32 valid = 0;
    for (u32 base = warp_id() * 32; base < T; base += blockDim.x) {
      const u32 i = base + lane_id();
      bool found = false;
      if (i < T && (segment == nullptr || segment[i] >= 0)) {
        const u32 u = q_map.run(i);
        if (u >= d) {
          const uint2 s = chains[u - d];
          const u32 most = limit(i);
          found = s.y > s.x && entries[s.x] <= most;
          if (found) {
            position[i] = (int)entries[bisect(s.x, s.y, most) - 1];
            length[i] = (int)(d + 1);
          }
        }
      }
      valid += found;
      const u32 word = __ballot_sync(FULL, found);
      if (lane_id() == 0) valid_words[base >> 5] = word;
    }
    add_up(&control->valid, valid);
    __syncthreads();
  }

  __device__ __forceinline__ void add_up(u32* sum, u32 x) const {
    for (int by = 16; by; by /= 2) x += __shfl_xor_sync(FULL, x, by);
    if (lane_id() == 0) atomicAdd(sum, x);
  }

  __device__ __forceinline__ bool is_valid(u32 i) const {
    return valid_words[i >> 5] >> (i & 31) & 1;
  }

  // The warp's count of symbols that the suffixes before q_end and k_end share, at most `most`.
  __device__ u32 shared_suffix(u32 q_end, u32 k_end, u32 most) const {
    for (u32 n = 0; n < most; n += 128) {
      const u32 mine = n + 4 * lane_id();
      const u32 size = mine < most
          ? common_suffix(q, q_end - mine, k, k_end - mine, 0u, min(4u, most - mine)) : 0;
      const u32 full = __ballot_sync(FULL, size == 4);
      if (full != FULL) {
        const u32 last = __ffs(~full) - 1;
        return n + 4 * last + __shfl_sync(FULL, size, last);
      }
    }
    return most;
  }

  // The warp's search of entries [lo, hi), as in match.cu.
  __device__ void search(u32 lo, u32 hi, u32 back, u32 q_end, u32 known, u32 bound, u32 first,
                         u32& best, u32& best_entry) const {
    best = best_entry = 0;
    for (u32 top = hi; top > lo; top = top > lo + 32 ? top - 32 : lo) {
      u32 n = 0, entry = 0;
      if (top - lo > lane_id()) {
        entry = entries[top - 1 - lane_id()];
        const u32 k_end = entry - back, most = min(bound, k_end - first);
        const bool hopeless = most > best && best >= known + 4 &&
            q.window(q_end - (best - 3)) != k.window(k_end - (best - 3));
        if (most > best && !hopeless) n = common_suffix(q, q_end, k, k_end, known, most);
      }
      u32 longest = n;
      for (int by = 16; by; by /= 2) longest = max(longest, __shfl_xor_sync(FULL, longest, by));
      if (longest > best) {
        best = longest;
        best_entry = __shfl_sync(FULL, entry, __ffs(__ballot_sync(FULL, n == longest)) - 1);
        if (best >= bound) return;
      }
    }
  }

  // Results of a maximal run of long positions that starts at i.
  __device__ void walk(u32 i, u32 depth) const {
    const u32 first = first_key(i), first_run = first_query(i);
    u32 v = (u32)position[i], l = depth;
    // Long without a new query run: a key run became visible, and it is the only candidate.
    if (!q_map.starts(i)) {
      const u32 runs = q_map.run(i) + 1;
      l = shared_suffix(runs, v, min(max_length, min(v - first, runs - first_run)));
      if (lane_id() == 0) length[i] = (int)l;
    }
    while (true) {
      const u32 o = i + 1 + lane_id();
      u32 ahead = 0;
      bool same = false;
      if (same_segment(i, o)) {
        ahead = q_map.run(o) - q_map.run(i);
        if (q_map.starts(o)) {
          same = l + ahead <= max_length && v + ahead <= limit(o) &&
                 q.at(q_map.run(o)) == k.at(v + ahead - 1);
        } else {
          same = !k_map.starts(o);
        }
      }
      const u32 differ = ~__ballot_sync(FULL, same);
      const u32 n = differ ? __ffs(differ) - 1 : 32;
      if (lane_id() < n) position[o] = (int)(v + ahead), length[o] = (int)(l + ahead);
      if (n) {
        const u32 moved = __shfl_sync(FULL, ahead, n - 1);
        i += n, v += moved, l += moved;
      }
      if (n == 32) continue;
      const u32 t = i + 1;
      if (!same_segment(i, t) || !is_valid(t)) return;
      const u32 u = q_map.run(t), most = limit(t);
      if (!q_map.starts(t)) {  // one more key run is visible; nothing else changed
        const u32 longest = min(max_length, min(most - first, u + 1 - first_run));
        const u32 size = shared_suffix(u + 1, most, longest);
        if (size >= l) v = most, l = size;
      } else {
        const uint2 s = chains[u + 1 - depth];
        u32 best, entry;
        search(s.x, bisect(s.x, s.y, most), 0, u + 1, depth, l < max_length ? l + 1 : l, first,
               best, entry);
        v = entry, l = best;
      }
      i = t;
      if (lane_id() == 0) position[i] = (int)v, length[i] = (int)l;
    }
  }

  __device__ void walk_all(u32 depth) {
    const u32 words = (T + 31) / 32;
    if (threadIdx.x == 0) control->next = 0;
    __syncthreads();
    while (true) {
      u32 w = lane_id() == 0 ? atomicAdd(&control->next, 1u) : 0;
      w = __shfl_sync(FULL, w, 0);
      if (w >= words) break;
      const u32 word = valid_words[w];
      u32 starts = word & ~(word << 1 | (w ? valid_words[w - 1] >> 31 : 0));
      while (starts) {
        walk(w * 32 + __ffs(starts) - 1, depth);
        starts &= starts - 1;
      }
    }
    __syncthreads();
  }

  __device__ void long_flips(u32 depth) {
    advance(depth);
    for (u32 base = warp_id() * 32; base < query_runs; base += blockDim.x) {
      const u32 c = base + lane_id(), t = c + depth;
      Chain s = {0, 0};
      if (c < query_runs && chain_goes_on(c, t)) s = {chains[c].x, chains[c].y};
      const bool on = s.b > s.a;
      const u32 x = on ? q.at(t) : 0, i = on ? q_starts[t] : 0, first = on ? first_key(i) : 0;
      const u32 bound = min(max_length - 1, on ? t - first_query(i) : 0);
#pragma unroll 1
      for (int m = 0; m < CF; ++m) {
        Chain f = {0, 0};
        if (on) f = step(s, x ^ (1u << m));
        const u32 hi = f.b > f.a ? bisect(f.a, f.b, limit(i)) : 0;
        u32 todo = __ballot_sync(FULL, f.b > f.a && hi > f.a);
        while (todo) {
          const u32 from = __ffs(todo) - 1;
          todo &= todo - 1;
          const u32 at = __shfl_sync(FULL, i, from);
          u32 best, entry;
          search(__shfl_sync(FULL, f.a, from), __shfl_sync(FULL, hi, from), 1,
                 __shfl_sync(FULL, t, from), depth, __shfl_sync(FULL, bound, from),
                 __shfl_sync(FULL, first, from), best, entry);
          if (lane_id() == 0 && best + 1 >= min_length) {
            flipped[(size_t)at * CF + m] = (int)entry;
          }
        }
      }
    }
    __syncthreads();
  }

  // Entries become positions; what is too short or has not started becomes null.
  __device__ void finish() {
    for (u32 i = threadIdx.x; i < T; i += blockDim.x) {
      const u32 newest = k_map.run(i), v = (u32)position[i];
      const bool none = length[i] == 0 || (u32)length[i] < min_length || v > newest;
      const int read = none ? -1 : (int)k_starts[v];
      position[i] = read;
      if (none) length[i] = 0;
#pragma unroll
      for (int m = 0; m < CF; ++m) {
        int& f = flipped[(size_t)i * CF + m];
        f = !q_map.starts(i) ? read : f < 0 || (u32)f > newest ? -1 : (int)k_starts[f];
      }
    }
    __syncthreads();
  }

  __device__ void run(u32 min_depth, u32 max_depth) {
    for (u32 i = threadIdx.x; i < T; i += blockDim.x) {
      position[i] = -1;
      length[i] = 0;
#pragma unroll
      for (int m = 0; m < CF; ++m) flipped[(size_t)i * CF + m] = -1;
    }
    u32 depth = 0, valid, drop;
    bool more;
    do {
      if (threadIdx.x == 0) control->valid = 0, control->drop = 0;
      advance(depth);
      step_chains(depth);
      read_positions(depth);
      valid = control->valid;
      drop = control->drop;
      ++depth;
      more = valid && depth < max_length;
      __syncthreads();
    } while (more && (depth < min_depth || (depth < max_depth && drop * 4 > query_runs)));
    if (more) {
      walk_all(depth);
      if (CF) long_flips(depth);
    }
    finish();
  }
};

// Runs of `symbols` [T]: the map, the runs' symbols and starts. Returns how many there are.
__device__ u32 collapse(const u8* symbols, const int* segment, u32 T, const RunMap& map, u8* runs,
                        u32* starts, Control* control) {
  const u32 words = (T + 31) / 32, share = (words + blockDim.x - 1) / blockDim.x;
  for (u32 base = warp_id() * 32; base < T; base += blockDim.x) {
    const u32 i = base + lane_id();
    const bool start = i < T && (i == 0 || symbols[i] != symbols[i - 1] ||
                                 (segment && segment[i] != segment[i - 1]));
    const u32 word = __ballot_sync(FULL, start);
    if (lane_id() == 0) map.words[base >> 5] = word;
  }
  __syncthreads();
  const u32 begin = min(words, threadIdx.x * share), end = min(words, begin + share);
  u32 own = 0;
  for (u32 w = begin; w < end; ++w) own += __popc(map.words[w]);
  u32 sum = own;
  for (u32 by = 1; by < 32; by *= 2) {
    const u32 below_sum = __shfl_up_sync(FULL, sum, by);
    if (lane_id() >= by) sum += below_sum;
  }
  if (lane_id() == 31) control->warp_sums[warp_id()] = sum;
  __syncthreads();
  u32 before = sum - own, total = 0;
  for (u32 w = 0; w < warp_count(); ++w) {
    if (w < warp_id()) before += control->warp_sums[w];
    total += control->warp_sums[w];
  }
  for (u32 w = begin; w < end; ++w) {
    map.before[w] = before;
    before += __popc(map.words[w]);
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < T; i += blockDim.x) {
    if (!map.starts(i)) continue;
    runs[map.run(i)] = symbols[i];
    starts[map.run(i)] = i;
  }
  if (threadIdx.x < 16) runs[total + threadIdx.x] = 0;
  __syncthreads();
  return total;
}

__device__ u8* carve(u8*& from, size_t bytes) {
  u8* at = from;
  from += (bytes + 15) / 16 * 16;
  return at;
}

// As suffix_match of match.cu; `strict`: 1 for the published successor rule.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
suffix_match_runs(const u8* __restrict__ q, const u8* __restrict__ k,
                  const int* __restrict__ segments, int* position, int* length, int* flipped,
                  u8* scratch, size_t scratch_stride, u32 routes, u32 routes_per_row, u32 T,
                  u32 max_length, u32 min_length, u32 super_shift, u32 min_depth, u32 max_depth,
                  u32 strict) {
#ifdef ROSAKIT_EMULATE
  u8* shared = emulated_shared();
#else
  extern __shared__ uint4 shared_words[];
  u8* shared = (u8*)shared_words;
#endif
  u8* global = scratch + blockIdx.x * scratch_stride;
  const u32 blocks = (T + 63) / 64, words = T / 32 + 2;
  Runs r;
  r.control = (Control*)carve(shared, sizeof(Control));
  u32* bases = (u32*)carve(shared, 2 * SUPERBLOCKS * 16 * 4);
  u8* ranks = carve(RANK_SHARED ? shared : global, 2 * rank_bytes(blocks));
  r.q_map = {(u32*)carve(global, words * 4), (u32*)carve(global, words * 4)};
  r.k_map = {(u32*)carve(global, words * 4), (u32*)carve(global, words * 4)};
  r.valid_words = (u32*)carve(global, words * 4);
  u8* q_runs = carve(global, (size_t)T + 32);
  u8* k_runs = carve(global, (size_t)T + 32);
  r.q_starts = (u32*)carve(global, (size_t)T * 4);
  r.k_starts = (u32*)carve(global, (size_t)T * 4);
  r.entries = (u32*)carve(global, (size_t)blocks * 256);
  r.spare = (u32*)carve(global, (size_t)blocks * 256);
  r.chains = (uint2*)carve(global, (size_t)T * 8);
  r.T = T;
  r.max_length = max_length;
  r.min_length = min_length;
  r.strict = strict;
  u8* second = ranks + rank_bytes(blocks);
  r.rank0 = {(uint4*)ranks, (u16*)(ranks + (size_t)blocks * 32), bases, super_shift};
  r.rank1 = {(uint4*)second, (u16*)(second + (size_t)blocks * 32), bases + SUPERBLOCKS * 16,
             super_shift};
  for (u32 at = blockIdx.x; at < routes; at += gridDim.x) {
    const size_t offset = (size_t)at * T;
    r.segment = segments ? segments + (size_t)(at / routes_per_row) * T : nullptr;
    r.position = position + offset;
    r.length = length + offset;
    r.flipped = flipped + offset * CF;
    if (threadIdx.x == 0) r.control->next = 0;
    __syncthreads();
    u32 high = 0;
    for (u32 i = threadIdx.x; i < T; i += blockDim.x) high |= q[offset + i] | k[offset + i];
    if (high >= 16) r.control->next = 1;
    r.query_runs = collapse(q + offset, r.segment, T, r.q_map, q_runs, r.q_starts, r.control);
    r.key_runs = collapse(k + offset, r.segment, T, r.k_map, k_runs, r.k_starts, r.control);
    r.two = CF > 4 || r.control->next;
    r.blocks = (r.key_runs + 63) / 64;
    r.q.words = (const u32*)q_runs;
    r.k.words = (const u32*)k_runs;
    __syncthreads();
    r.run(min_depth, max_depth);
  }
}
