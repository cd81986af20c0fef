// The exact suffix match of token granularity, one thread block a route.
//
// Level d holds every key position e as an entry, stably sorted by its last d symbols (the newest
// symbol first), then by time. Partitioning by the entry's next symbol k[e] and moving each entry
// on to e + 1 gives level d + 1, one pass of a least-significant-digit radix sort.
// A *chain* starts at position c with the entries of its segment before c, a contiguous range
// [a, b) of level 0, and consumes q[c], q[c + 1], ...: the image of a range under one symbol x is
// again a range, [rank(a, x), rank(b, x)) of the next level. Alive at depth d it proves a match of
// length d for position i = c + d - 1, and entry b - 1 is the latest successor. Deeper levels
// overwrite shallower ones, so what stays is the longest. The same two places also answer for every
// flipped symbol: the counterfactual positions cost no chains of their own.
//
// Levels stop when they no longer narrow the ranges. Positions alive then are *long*: one warp a run
// of them extends the match while the next symbols agree (which is exact: a latest longest match
// that can be extended is the latest longest one of the next position) and searches its range where
// they do not.
//
// Compile-time: CF (flipped bits, 0..8, wide: 0..16), WIDE (bytes of a wide symbol, 2 or 4; 0: one
// byte), THREADS, MIN_BLOCKS, INDEX_BYTES (2 up to 65536 positions,
// else 4), NARROW_CHAINS (1: 4-byte entries, up to 131072 positions), and what lives in shared
// memory: ENTRIES_SHARED, CHAINS_SHARED (0, 1), RANK_SHARED, K_SHARED, Q_SHARED (0, 1: for 4-bit symbols only, 2: for 8-bit symbols too).

constexpr u32 NONE = 0xffffffffu;
#if WIDE == 2
typedef u16 Symbol;
#elif WIDE == 4
typedef u32 Symbol;
#else
typedef u8 Symbol;
#endif

struct Control {          // in shared memory, one a block
  u32 totals[16];
  u32 alive;              // chains alive after the level
  u32 drop;               // sum over chains of log2 of how much their range shrank
  u32 spread;             // sum over chains of the size of their range, at most MANY each
  u32 used;               // bits that any symbol of the route has set
  u32 next;               // work counter of the walk
  u32 pending;            // runs that wait for a search by the whole block
  u32 pending_after;
  unsigned long long best;            // of that search: length << 32 | entry
  u32 edge_end[32];       // per warp: the range end of its first chain, 0 if it was dead,
  u32 edge_left[32];      // and whether its last chain went on
};

// One route's problem, in the order the kernel uses it.
struct Route {
  const int* segment;     // [T] or null
  int* position;          // [T]
  int* length;            // [T]
  int* flipped;           // [T][CF]
  u32 T;
  u32 max_length;         // 0xffffffff: no limit
  u32 min_length;
};

__device__ __forceinline__ bool same_segment(const Route& r, u32 first, u32 t) {
  if (t >= r.T) return false;
  if (r.segment == nullptr) return true;
  const int start = r.segment[t];
  return start >= 0 && start <= (int)first;
}

constexpr u32 FEW = 12;   // entries of a range that one thread looks at
constexpr u32 MANY = 64;

template <int SB>
struct Matcher {
  Route route;
  Symbols<SB> q, k;
  Level<SB> level;
  Index* entries;
  Index* spare;
  Chains chains;
  u32* alive_words;        // [T / 32 + 1], chains alive when the levels stopped
  Control* control;
  u32 blocks;

  // Level d to d + 1: entries, rank structures. Level 0, the positions themselves, is not stored.
  __device__ void advance(u32 d) {
    const u32 T = route.T;
    const Symbols<SB> keys = k;
    const Index* from = entries;
    auto load = [from, d, T](u32 p) { return d ? (u32)from[p] : min(p, T); };
    auto on = [T](Index e) { return e < T ? (u32)e + 1u : T; };
    auto low_digit = [keys](Index e) { return keys.digit(e, 0); };
    Index* other = spare;
    if constexpr (SB == 4) {
      partition<BATCH, Index>(level.rank0, blocks, other, control->totals, load, low_digit, on);
      spare = entries;
      entries = other;
    } else if constexpr (SB == 32) {
      for (u32 w = 0; w < level.digits; ++w) {
        const bool last = w + 1 == level.digits;
        partition<BATCH, Index>(
            level.rank_of(w), blocks, other, control->totals,
            [from, d, w, T](u32 p) { return d || w ? (u32)from[p] : min(p, T); },
            [keys, w](Index e) { return keys.digit(e, w); },
            [last, T](Index e) { return last && e < T ? (u32)e + 1u : (u32)e; });
        spare = entries;
        entries = other;
        other = spare;
        from = entries;
      }
    } else {
      auto load_spare = [other](u32 p) { return (u32)other[p]; };
      partition<BATCH, Index>(level.rank0, blocks, other, control->totals, load, low_digit,
                              [](Index e) { return (u32)e; });
      partition<BATCH, Index>(level.rank1, blocks, entries, control->totals, load_spare,
                              [keys](Index e) { return keys.digit(e, 1); }, on);
    }
  }

  __device__ __forceinline__ Chain initial(u32 c) const {
    if (c >= route.T) return {0, 0};
    if (route.segment == nullptr) return {0, c};
    const int start = route.segment[c];
    return start < 0 ? Chain{0, 0} : Chain{(u32)start, c};
  }

  // The flips found at depth d + 1. Deeper levels overwrite shallower ones. Where entries are in
  // global memory a random read of them for each level would cost most of the time, so only the
  // place in the level is noted, as a negative number, and `settle` reads the entry once, when the
  // next level finds nothing deeper.
  __device__ __forceinline__ void write_flips(u32 t, const u32* a, const u32* b, bool first,
                                              bool keep) const {
    if (CF == 0) return;
    int* out = route.flipped + (size_t)t * CF;
#pragma unroll
    for (int m = 0; m < CF; ++m) {
      const bool found = keep && b[1 + m] > a[1 + m];
      if (found || first) out[m] = found ? (int)entries[b[1 + m] - 1] : -1;
    }
  }

  // Flips need chains that have died out, so that only few searches are left for them.
  static constexpr bool NEAR = CF == 0 && SB == 4;
  static constexpr bool ONCE = CF > 0 && SB == 4 && !ENTRIES_SHARED;
  struct alignas(CF % 4 == 0 ? 16 : CF % 2 == 0 ? 8 : 4) Flips {
    int at[CF ? CF : 1];
  };

  // As write_flips, for every position of a level; `found`: a and b are those of its chain.
  __device__ __forceinline__ void note_flips(u32 t, const u32* a, const u32* b, bool found,
                                             u32 d, const Index* before) const {
    Flips* place = (Flips*)route.flipped + t;
    Flips now;
    if (d) {
      now = *place;
    } else {
#pragma unroll
      for (int m = 0; m < CF; ++m) now.at[m] = -1;
    }
    bool changed = d == 0;
#pragma unroll
    for (int m = 0; m < CF; ++m) {
      if (found && b[1 + m] > a[1 + m]) {
        now.at[m] = -1 - (int)b[1 + m];
        changed = true;
      } else if (now.at[m] < -1) {
        now.at[m] = (int)before[-2 - now.at[m]];
        changed = true;
      }
    }
    if (changed) *place = now;
  }

  // What is still noted for position t, read from the level that it was noted in.
  __device__ __forceinline__ void settle(u32 t, const Index* level_entries) const {
    int* out = route.flipped + (size_t)t * CF;
#pragma unroll
    for (int m = 0; m < CF; ++m) {
      if (out[m] < -1) out[m] = (int)level_entries[-2 - out[m]];
    }
  }
  __device__ void settle_all() const {
    if (!ONCE) return;
    for (u32 t = threadIdx.x; t < route.T; t += blockDim.x) settle(t, entries);
    __syncthreads();
  }

  __device__ __forceinline__ void write(u32 i, u32 successor, u32 size) const {
    const bool keep = size >= route.min_length;
    route.position[i] = keep ? (int)successor : -1;
    route.length[i] = keep ? (int)size : 0;
  }

  // One symbol of every chain; `entries` are already those of depth d + 1, `before` those of d.
  // A chain alive at depth d is the longest match of its last position where the chain to its left,
  // which would make it d + 1 long, does not go on: then the result is written, once. (With two
  // digits the entries before are gone, and every level writes over the shallower one's result.)
  __device__ void step_chains(u32 d, const Index* before) {
    constexpr bool EAGER = SB != 4;
    u32 alive = 0, drop = 0, spread = 0;
    const u32 T = route.T, lane = lane_id(), warp = warp_id();
    const bool keep = d + 1 >= route.min_length;
    const u32 share = ((T + 31) / 32 + warp_count() - 1) / warp_count() * 32;
    const u32 begin = warp * share, end = min(T, begin + share);
    u32 left = 0;
    if (lane == 0) control->edge_end[warp] = 0;
    for (u32 group = begin; group < end; group += 32 * BATCH) {
      PackedChain packed[BATCH];
      u32 symbol[BATCH];
#pragma unroll
      for (u32 j = 0; j < BATCH; ++j) {
        const u32 c = group + j * 32 + lane;
        packed[j] = DEAD;
        if (d && c < end) packed[j] = chains.fetch(c);
        symbol[j] = c < end && c + d < T ? q.at(c + d) : 0;
      }
#pragma unroll
      for (u32 j = 0; j < BATCH; ++j) {
        const u32 c0 = group + j * 32, c = c0 + lane, t = c + d;
        if (c0 >= end) break;
        const Chain s = d == 0 ? initial(c) : chains.open(c, packed[j]);
        const bool was = c < end && s.b > s.a;
        bool now = false;
        const bool on = was && same_segment(route, c, t);
        u32 a[1 + CF], b[1 + CF];
        if (on) {
          if (CF) {
            level.step_all(s, symbol[j], a, b);
          } else {
            const Chain n = level.step(s, symbol[j]);
            a[0] = n.a, b[0] = n.b;
          }
          now = b[0] > a[0];
          drop += 32 - __clz(s.b - s.a);
          if (now) {
            ++alive;
            drop -= 32 - __clz(b[0] - a[0]);
            spread += min(b[0] - a[0], MANY);
            chains.put(c, {a[0], b[0]});
            if (EAGER && keep) {
              route.position[t] = (int)entries[b[0] - 1];
              route.length[t] = (int)(d + 1);
            }
          }
          if (!ONCE) write_flips(t, a, b, d == 0, keep);
        } else if (!ONCE && d == 0 && c < end) {
#pragma unroll
          for (int m = 0; m < CF; ++m) route.flipped[(size_t)c * CF + m] = -1;
        }
        if (ONCE && c < end && t < T) note_flips(t, a, b, on && keep, d, before);
        if (ONCE && d && c == 0) settle(d - 1, before);  // no chain starts to the left of it
        if (c < end && !now) {
          if (was || d == 0) chains.kill(c);
        }
        // Written eagerly, a match shorter than min_length would otherwise never be.
        if (d == 0 && c < end && (!now || (EAGER && !keep))) {
          route.position[c] = -1, route.length[c] = 0;
        }
        const u32 word = __ballot_sync(FULL, now);
        if (!EAGER && d) {
          const bool edge = c0 == begin && lane == 0 && c > 0;
          if (edge) {
            control->edge_end[warp] = was ? s.b : 0;
          } else if (was && !((word << 1 | left) >> lane & 1)) {
            write(t - 1, before[s.b - 1], d);
          }
          left = word >> 31;
        }
      }
    }
    if (lane == 0) control->edge_left[warp] = left;
    for (int step = 16; step; step /= 2) {
      alive += __shfl_xor_sync(FULL, alive, step);
      drop += __shfl_xor_sync(FULL, drop, step);
      spread += __shfl_xor_sync(FULL, spread, step);
    }
    if (lane == 0) {
      atomicAdd(&control->spread, spread);
      atomicAdd(&control->alive, alive);
      atomicAdd(&control->drop, drop);
    }
    __syncthreads();
    if (!EAGER && d && threadIdx.x < warp_count()) {
      const u32 w = threadIdx.x, of = control->edge_end[w];
      if (of && !control->edge_left[w - 1]) write(w * share + d - 1, before[of - 1], d);
    }
  }

  // Every chain alive at the last level is as long as max_length allows.
  __device__ void write_capped(u32 depth) const {
    for (u32 c = threadIdx.x; c < route.T; c += blockDim.x) {
      const Chain s = chains.get(c);
      if (s.b > s.a) write(c + depth - 1, entries[s.b - 1], depth);
    }
  }

  // The warp's search of entries [lo, hi): the longest common suffix of q[.. q_end) with
  // k[.. entry - back), at least `known` and at most `bound`, the latest on ties.
  __device__ void search(u32 lo, u32 hi, u32 back, u32 q_end, u32 known, u32 bound, u32 first,
                         u32& best, u32& best_entry) const {
    const u32 lane = lane_id();
    best = 0;
    best_entry = 0;
    for (u32 top = hi; top > lo; top = top > lo + 32 ? top - 32 : lo) {
      u32 n = 0, entry = 0;
      if (top - lo > lane) {
        entry = entries[top - 1 - lane];
        const u32 k_end = entry - back;
        const u32 limit = min(bound, k_end - first);
        if (limit > best) {
          // Where the best so far is long, most candidates fail at the symbols just before its end.
          constexpr u32 W = Symbols<SB>::PER_WORD;
          const bool hopeless = best >= known + W &&
              q.window(q_end - (best + 1 - W)) != k.window(k_end - (best + 1 - W));
          if (!hopeless) n = common_suffix(q, q_end, k, k_end, known, limit);
        }
      }
      u32 most = n;
      for (int step = 16; step; step /= 2) most = max(most, __shfl_xor_sync(FULL, most, step));
      if (most > best) {
        best = most;
        best_entry = __shfl_sync(FULL, entry, __ffs(__ballot_sync(FULL, n == most)) - 1);
        if (best >= bound) return;
      }
    }
  }

  __device__ __forceinline__ bool is_alive(u32 c) const {
    return (alive_words[c >> 5] >> (c & 31)) & 1;
  }

  // The whole block's search, as `search` with back 0; the result is in control->best.
  __device__ void search_together(u32 lo, u32 hi, u32 q_end, u32 known, u32 bound,
                                  u32 first) const {
    typedef unsigned long long u64;
    constexpr u32 W = Symbols<SB>::PER_WORD;
    volatile u64* shared_best = &control->best;
    for (u32 back = 1 + threadIdx.x; back <= hi - lo; back += blockDim.x) {
      const u32 entry = entries[hi - back];
      const u64 best = *shared_best;
      if (((u64)bound << 32 | entry) < best) break;  // those behind are older still
      const u32 limit = min(bound, entry - first);
      if (((u64)limit << 32 | entry) < best) continue;
      const u32 size = (u32)(best >> 32);
      if (size >= known + W && q.window(q_end - (size - W)) != k.window(entry - (size - W))) {
        continue;
      }
      const u64 found = (u64)common_suffix(q, q_end, k, entry, known, limit) << 32 | entry;
      if (found > best) atomicMax(&control->best, found);
    }
    __syncthreads();
  }

  // Walks on from position i, whose longest match has successor p and length l: results of the rest
  // of its maximal run of long positions. Returns the position before one whose range is too large
  // for a warp to search, or NONE at the end of the run.
  __device__ u32 walk(u32 i, u32 p, u32 l, u32 depth) const {
    constexpr u32 AHEAD = Q_SHARED ? 4 : 8;  // words of 32 symbols compared at a time
    const u32 lane = lane_id();
    while (true) {
      u32 n = 0;
      if (l < route.max_length) {
        u32 differ[AHEAD];
#pragma unroll
        for (u32 w = 0; w < AHEAD; ++w) {
          const u32 o = i + 1 + w * 32 + lane;
          differ[w] = !(l + w * 32 + lane < route.max_length && same_segment(route, i, o) &&
                        q.at(o) == k.at(p + w * 32 + lane));
        }
#pragma unroll
        for (u32 w = 0; w < AHEAD; ++w) {
          const u32 word = __ballot_sync(FULL, differ[w]);
          if (n == w * 32) n += word ? __ffs(word) - 1 : 32;
        }
#pragma unroll
        for (u32 w = 0; w < AHEAD; ++w) {
          const u32 by = w * 32 + lane;
          if (by < n) {
            route.position[i + 1 + by] = (int)(p + 1 + by);
            route.length[i + 1 + by] = (int)(l + 1 + by);
          }
        }
        i += n, p += n, l += n;
        if (n == AHEAD * 32) continue;
      }
      const u32 t = i + 1, at = t + 1 - depth;
      if (!same_segment(route, i, t) || !is_alive(at)) return NONE;
      const Chain s = chains.get(at);
      if (s.b - s.a > WARP_SEARCH) return i;
      const u32 first = route.segment ? (u32)route.segment[i] : 0;
      u32 best, entry;
      search(s.a, s.b, 0, t + 1, depth, longer(l), first, best, entry);
      i = t, p = entry, l = best;
      if (lane == 0) route.position[i] = (int)p, route.length[i] = (int)l;
    }
  }

  // An older match of the same length may go on where the latest one ends: one more than l.
  __device__ __forceinline__ u32 longer(u32 l) const { return l < route.max_length ? l + 1 : l; }

  // The result of the position that chain c has come to, if no candidate agrees for a word of
  // symbols more than the levels have shown: one thread, one comparison a candidate.
  __device__ __forceinline__ bool settle_near(u32 c, Chain s, u32 depth) const {
    constexpr u32 W = Symbols<SB>::PER_WORD;
    const u32 i = c + depth - 1, first = route.segment ? (u32)route.segment[i] : 0;
    const u32 mine = q.window(c);
    u32 best = 0, best_entry = 0;
    for (u32 at = s.b; at-- > s.a;) {
      const u32 entry = entries[at];
      const u32 limit = min(route.max_length, entry - first);
      const u32 differ = mine ^ k.window(entry - depth);
      const u32 size = depth + (differ ? __clz(differ) / SB : W);
      if (size == depth + W && size < limit) return false;
      if (min(size, limit) > best) best = min(size, limit), best_entry = entry;
    }
    route.position[i] = (int)best_entry;
    route.length[i] = (int)best;
    return true;
  }

  __device__ void walk_all(u32 depth) {
    const u32 lane = lane_id(), words = (route.T + 31) / 32;
    Index* pending = spare;  // positions before a search for the whole block
    for (u32 w = warp_id(); w < words; w += warp_count()) {
      const u32 c = w * 32 + lane;
      const Chain s = c < route.T ? chains.get(c) : Chain{0, 0};
      bool left = s.b > s.a;
      if (NEAR && left && s.b - s.a <= FEW) left = !settle_near(c, s, depth);
      const u32 word = __ballot_sync(FULL, left);
      if (lane == 0) alive_words[w] = word;
    }
    if (threadIdx.x == 0) control->next = control->pending = 0, alive_words[words] = 0;
    __syncthreads();
    while (true) {
      const u32 w = take();
      if (w >= words) break;
      const u32 word = alive_words[w];
      u32 starts = word & ~(word << 1 | (w ? alive_words[w - 1] >> 31 : 0));
      while (starts) {
        const u32 c = w * 32 + __ffs(starts) - 1, i = c + depth - 1;
        if (NEAR && c && same_segment(route, c - 1, i)) {
          const Chain before = chains.get(c - 1);
          if (before.b > before.a) {  // settled: the match goes on from there
            postpone(walk(i - 1, (u32)route.position[i - 1], (u32)route.length[i - 1], depth),
                     pending);
            starts &= starts - 1;
            continue;
          }
        }
        const u32 p = entries[chains.get(c).b - 1];
        if (lane == 0) route.position[i] = (int)p, route.length[i] = (int)depth;
        postpone(walk(i, p, depth, depth), pending);
        starts &= starts - 1;
      }
    }
    __syncthreads();
    while (control->pending) {
      const u32 count = control->pending;
      for (u32 at = 0; at < count; ++at) {
        const u32 i = pending[at], t = i + 1;
        const Chain s = chains.get(t + 1 - depth);
        const u32 first = route.segment ? (u32)route.segment[i] : 0;
        if (threadIdx.x == 0) control->best = 0;
        __syncthreads();
        search_together(s.a, s.b, t + 1, depth, longer((u32)route.length[i]), first);
        if (threadIdx.x == 0) {
          route.position[t] = (int)(u32)control->best;
          route.length[t] = (int)(control->best >> 32);
        }
        __syncthreads();
      }
      if (threadIdx.x == 0) control->next = control->pending = 0;
      __syncthreads();
      // Each warp takes at most as many runs as are left, so a place that it writes was read.
      for (u32 at = warp_id(); at < (count + warp_count() - 1) / warp_count() * warp_count();
           at += warp_count()) {
        const u32 i = at < count ? pending[at] + 1 : NONE;
        __syncthreads();
        if (i != NONE) {
          postpone(walk(i, (u32)route.position[i], (u32)route.length[i], depth), pending);
        }
      }
      __syncthreads();
    }
    if (route.min_length > depth) {  // what the walk needed and the caller does not want
      for (u32 t = threadIdx.x; t < route.T; t += blockDim.x) {
        if ((u32)route.length[t] < route.min_length) route.position[t] = -1, route.length[t] = 0;
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ u32 take() const {
    const u32 mine = lane_id() == 0 ? atomicAdd(&control->next, 1u) : 0;
    return __shfl_sync(FULL, mine, 0);
  }
  __device__ __forceinline__ void postpone(u32 i, Index* pending) const {
    if (i != NONE && lane_id() == 0) pending[atomicAdd(&control->pending, 1u)] = (Index)i;
  }

  // Counterfactual positions deeper than the levels: the flipped symbol after a long match.
  __device__ void long_flips(u32 depth) {
    advance(depth);
    const u32 T = route.T;
    for (u32 base = warp_id() * 32; base < T; base += warp_count() * 32) {
      if (alive_words[base >> 5] == 0) continue;
      const u32 c = base + lane_id(), t = c + depth;
      u32 a[1 + CF] = {}, b[1 + CF] = {};
      const bool on = c < T && is_alive(c) && same_segment(route, c, t);
      if (on) {
        level.step_all(chains.get(c), q.at(t), a, b);
      }
      const u32 first = on && route.segment ? (u32)route.segment[c] : 0;
      u32 bound = 0;
      if (on) {
        const u32 previous = (u32)route.length[t - 1];  // 0: shorter than min_length
        bound = min(route.max_length, previous ? previous + 1 : route.min_length) - 1;
      }
#pragma unroll
      for (int m = 1; m <= CF; ++m) {
        const bool found = on && b[m] > a[m];
        const bool direct = (b[m] - a[m] == 1 || bound <= depth) && depth + 1 >= route.min_length;
        if (found && direct) route.flipped[(size_t)t * CF + m - 1] = (int)entries[b[m] - 1];
        u32 todo = __ballot_sync(FULL, found && !direct);
        while (todo) {
          const u32 from = __ffs(todo) - 1;
          todo &= todo - 1;
          const u32 at = __shfl_sync(FULL, t, from);
          const u32 lo = __shfl_sync(FULL, a[m], from), hi = __shfl_sync(FULL, b[m], from);
          const u32 limit = __shfl_sync(FULL, bound, from);
          const u32 begin = __shfl_sync(FULL, first, from);
          u32 best, entry;
          search(lo, hi, 1, at, depth, limit, begin, best, entry);
          if (lane_id() == 0 && best + 1 >= route.min_length) {
            route.flipped[(size_t)at * CF + m - 1] = (int)entry;
          }
        }
      }
    }
    __syncthreads();
  }

  __device__ void run(u32 min_depth, u32 max_depth, u32 near) {
    const u32 T = route.T;
    u32 depth = 0, alive, drop, spread;
    do {
      if (threadIdx.x == 0) control->alive = 0, control->drop = 0, control->spread = 0;
      const Index* before = entries;
      advance(depth);
      step_chains(depth, before);
      __syncthreads();
      alive = control->alive;
      drop = control->drop;
      spread = control->spread;
      ++depth;
      __syncthreads();
      if (alive == 0) break;
      if (depth >= route.max_length) {
        if (SB == 4) write_capped(depth);
        break;
      }
      if (NEAR && spread <= near * T && depth >= min_depth) break;
    } while (depth < min_depth || (depth < max_depth && drop * 4 > T));
    settle_all();
    if (alive == 0 || depth >= route.max_length) return;
    walk_all(depth);
    if (CF) long_flips(depth);
  }
};

template <int SB>
__device__ void load_symbols(const Symbol* source, u32* words, u32 T) {
  constexpr u32 N = 32 / SB;
  const u32 count = T / N + 2;
  for (u32 w = threadIdx.x; w < count; w += blockDim.x) {
    u32 packed = 0;
#pragma unroll
    for (u32 j = 0; j < N; ++j) {
      const u32 i = w * N + j;
      if (i < T) packed |= (u32)source[i] << (j * SB);
    }
    words[w] = packed;
  }
}

// Where one thread block keeps what it needs: shared memory first, the rest in its scratch.
struct Workspace {
  Control* control;
  u32* bases;
  u32* alive_words;
  Index* entries;
  Index* spare;
  Chains chains;
  u8* q_words[2];         // for 4-bit and for wider symbols, and so below
  u8* k_words[2];
  u8* ranks[2];

  __device__ Workspace(u8* shared, u8* global, u32 T, u32 blocks) {
    const size_t entry_bytes = (size_t)blocks * 64 * sizeof(Index);
    control = (Control*)carve(shared, sizeof(Control));
    bases = (u32*)carve(shared, (WIDE ? MAX_DIGITS : 2) * SUPERBLOCKS * 16 * 4);
    alive_words = (u32*)carve(shared, (T / 32 + 2) * 4);
    entries = (Index*)carve(ENTRIES_SHARED ? shared : global, entry_bytes);
    spare = (Index*)carve(ENTRIES_SHARED ? shared : global, entry_bytes);
    const size_t chain_bytes = (size_t)T * sizeof(PackedChain);
    chains.packed = (PackedChain*)carve(CHAINS_SHARED ? shared : global, chain_bytes);
    chains.large = NARROW_CHAINS ? (u32*)carve(global, (size_t)T * 4) : nullptr;
#if WIDE
    q_words[1] = carve(global, (size_t)T * 4 + 16);
    k_words[1] = carve(global, (size_t)T * 4 + 16);
    ranks[1] = carve(global, MAX_DIGITS * rank_bytes(blocks));
#else
    // Two places each: one for 4-bit symbols, one twice the size for 8-bit symbols.
    two_places(q_words, Q_SHARED, shared, global, ((size_t)T + 1) / 2 + 16);
    two_places(k_words, K_SHARED, shared, global, ((size_t)T + 1) / 2 + 16);
    two_places(ranks, RANK_SHARED, shared, global, rank_bytes(blocks));
#endif
  }
  static __device__ void two_places(u8* (&at)[2], int in_shared, u8*& shared, u8*& global,
                                    size_t bytes) {
    at[0] = carve(in_shared ? shared : global, in_shared == 2 ? 2 * bytes : bytes);
    at[1] = in_shared == 2 ? at[0] : carve(global, 2 * bytes);
  }
  static __device__ u8* carve(u8*& from, size_t bytes) {
    u8* at = from;
    from += (bytes + 15) / 16 * 16;
    return at;
  }
};

template <int SB>
__device__ void solve(const Workspace& w, const Route& route, const Symbol* q,
                      const Symbol* k, u32 used, u32 super_shift, u32 min_depth, u32 max_depth,
                      u32 near) {
  const u32 blocks = (route.T + 63) / 64;
  u32* q_words = (u32*)w.q_words[SB != 4];
  u32* k_words = (u32*)w.k_words[SB != 4];
  u8* ranks = w.ranks[SB != 4];
  load_symbols<SB>(q, q_words, route.T);
  load_symbols<SB>(k, k_words, route.T);
  Matcher<SB> m;
  m.route = route;
  m.q.words = q_words;
  m.k.words = k_words;
  if constexpr (SB == 32) {
    const u32 digits = max((35u - __clz(used)) / 4, (u32)(CF + 3) / 4);
    m.level = {ranks, w.bases, blocks, super_shift, max(digits, 1u)};
  } else {
    u8* second = ranks + rank_bytes(blocks);
    m.level.rank0 = {(uint4*)ranks, (u16*)(ranks + (size_t)blocks * 32), w.bases, super_shift};
    m.level.rank1 = {(uint4*)second, (u16*)(second + (size_t)blocks * 32),
                     w.bases + SUPERBLOCKS * 16, super_shift};
  }
  m.entries = w.entries;
  m.spare = w.spare;
  m.chains = w.chains;
  m.alive_words = w.alive_words;
  m.control = w.control;
  m.blocks = blocks;
  __syncthreads();
  m.run(min_depth, max_depth, near);
  __syncthreads();
}

// q, k: [routes][T]; segments: [routes / routes_per_row][T] or null; position, length: [routes][T];
// flipped: [routes][T][CF]; scratch: scratch_stride bytes a thread block.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
suffix_match(const Symbol* __restrict__ q, const Symbol* __restrict__ k, const int* __restrict__ segments,
             int* position, int* length, int* flipped, u8* scratch, size_t scratch_stride,
             u32 routes, u32 routes_per_row, u32 T, u32 max_length, u32 min_length, u32 super_shift,
             u32 min_depth, u32 max_depth, u32 near) {
#ifdef ROSAKIT_EMULATE
  u8* shared = emulated_shared();
#else
  extern __shared__ uint4 shared_words[];
  u8* shared = (u8*)shared_words;
#endif
  const Workspace w(shared, scratch + blockIdx.x * scratch_stride, T, (T + 63) / 64);
  for (u32 at = blockIdx.x; at < routes; at += gridDim.x) {
    const size_t offset = (size_t)at * T;
    const Route route = {segments ? segments + (size_t)(at / routes_per_row) * T : nullptr,
                         position + offset, length + offset, flipped + offset * CF, T, max_length,
                         min_length};
    if (threadIdx.x == 0) w.control->used = 0;
    __syncthreads();
    u32 used = 0;
    for (u32 i = threadIdx.x; i < T; i += blockDim.x) used |= (u32)q[offset + i] | k[offset + i];
    for (int step = 16; step; step /= 2) used |= __shfl_xor_sync(FULL, used, step);
    if (lane_id() == 0) atomicOr(&w.control->used, used);
    __syncthreads();
    used = w.control->used;
#if WIDE
    solve<32>(w, route, q + offset, k + offset, used, super_shift, min_depth, max_depth, near);
#else
    if (CF > 4 || used >= 16) {
      solve<8>(w, route, q + offset, k + offset, used, super_shift, min_depth, max_depth, near);
    } else {
      solve<4>(w, route, q + offset, k + offset, used, super_shift, min_depth, max_depth, near);
    }
#endif
  }
}
