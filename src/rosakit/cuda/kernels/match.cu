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
// Compile-time: CF (flipped bits, 0..8), THREADS, MIN_BLOCKS, INDEX_BYTES (2 up to 65536 positions,
// else 4), and what lives in shared memory: ENTRIES_SHARED, CHAINS_SHARED (0, 1), RANK_SHARED,
// K_SHARED, Q_SHARED (0, 1: for 4-bit symbols only, 2: for 8-bit symbols too).

#if INDEX_BYTES == 2
typedef u16 Index;
#else
typedef u32 Index;
#endif

struct Chain { u32 a, b; };
#if INDEX_BYTES == 2
typedef u32 PackedChain;   // the last entry, not the end: 65536 entries fit
__device__ __forceinline__ PackedChain pack(u32 a, u32 b) { return a | (b - 1) << 16; }
__device__ __forceinline__ Chain unpack(PackedChain s) { return {s & 0xffffu, (s >> 16) + 1}; }
constexpr PackedChain DEAD = 1;
#else
typedef uint2 PackedChain;
__device__ __forceinline__ PackedChain pack(u32 a, u32 b) { return make_uint2(a, b); }
__device__ __forceinline__ Chain unpack(PackedChain s) { return {s.x, s.y}; }
#define DEAD make_uint2(0, 0)
#endif

struct Control {          // in shared memory, one a block
  u32 totals[16];
  u32 alive;              // chains alive after the level
  u32 drop;               // sum over chains of log2 of how much their range shrank
  u32 high_digit;         // whether any symbol of the route needs a second digit
  u32 next_word;          // work counter of the walk
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

template <int SB>
struct Level {             // what a chain needs to take one step
  Rank rank0, rank1;       // of the low and (8-bit symbols) the high digit

  // The image of a range under symbol x; empty where no entry of the range has it.
  __device__ __forceinline__ Chain step(Chain s, u32 x) const {
    Chain n = {rank<false>(rank0, s.a, x & 15), rank<true>(rank0, s.b - 1, x & 15)};
    if (SB == 8 && n.b > n.a) {
      n = {rank<false>(rank1, n.a, x >> 4), rank<true>(rank1, n.b - 1, x >> 4)};
    }
    return n;
  }

  // One digit: places of x (out[0]) and of x with each low bit flipped (out[1 + m]).
  template <bool THROUGH>
  __device__ __forceinline__ void four_flips(u32 p, u32 x, u32* out) const {
    const uint4 w = rank0.planes[p >> 5];
    const u32 low = before<THROUGH>(p);
    const bool upper = p & 32;
    const u32 side = upper ? low : ~low;
    const u32 m0 = w.x ^ ((x & 1u) - 1u), m1 = w.y ^ (((x >> 1) & 1u) - 1u);
    const u32 m2 = w.z ^ (((x >> 2) & 1u) - 1u), m3 = w.w ^ (((x >> 3) & 1u) - 1u);
    const u32 m01 = m0 & m1 & side, m23 = m2 & m3 & side;
    const u32 masks[5] = {m01 & m23, ~m0 & m1 & m23, m0 & ~m1 & m23, m01 & ~m2 & m3,
                          m01 & m2 & ~m3};
#pragma unroll
    for (int m = 0; m <= (CF < 4 ? CF : 4); ++m) {
      const u32 n = __popc(masks[m]);
      out[m] = rank0.base(p >> 6, m ? x ^ (1u << (m - 1)) : x) + (upper ? n : 0u - n);
    }
  }

  // The images under x and under x with each of CF bits flipped.
  __device__ __forceinline__ void step_all(Chain s, u32 x, u32* a, u32* b) const {
    if (SB == 4) {
      four_flips<false>(s.a, x, a);
      four_flips<true>(s.b - 1, x, b);
    } else {
      const Chain low = {rank<false>(rank0, s.a, x & 15), rank<true>(rank0, s.b - 1, x & 15)};
#pragma unroll
      for (int m = 0; m <= CF; ++m) {
        const u32 y = m ? x ^ (1u << (m - 1)) : x;
        Chain n = low;
        if (m >= 1 && m <= 4) {
          n = {rank<false>(rank0, s.a, y & 15), rank<true>(rank0, s.b - 1, y & 15)};
        }
        if (n.b > n.a) n = {rank<false>(rank1, n.a, y >> 4), rank<true>(rank1, n.b - 1, y >> 4)};
        a[m] = n.a, b[m] = n.b;
      }
    }
  }
};

template <int SB>
struct Matcher {
  Route route;
  Symbols<SB> q, k;
  Level<SB> level;
  Index* entries;
  Index* spare;
  PackedChain* chains;
  u32* alive_words;        // [T / 32 + 1], chains alive when the levels stopped
  Control* control;
  u32 blocks;

  // Level d to d + 1: entries, rank structures.
  __device__ void advance() {
    const u32 T = route.T;
    const Symbols<SB> keys = k;
    auto on = [T](Index e) { return e < T ? (u32)e + 1u : T; };
    if (SB == 4) {
      partition<Index>(level.rank0, blocks, entries, spare, control->totals,
                       [keys](Index e) { return keys.digit(e, 0); }, on);
      Index* t = entries; entries = spare; spare = t;
    } else {
      partition<Index>(level.rank0, blocks, entries, spare, control->totals,
                       [keys](Index e) { return keys.digit(e, 0); },
                       [](Index e) { return (u32)e; });
      partition<Index>(level.rank1, blocks, spare, entries, control->totals,
                       [keys](Index e) { return keys.digit(e, 1); }, on);
    }
  }

  __device__ __forceinline__ Chain initial(u32 c) const {
    if (c >= route.T) return {0, 0};
    if (route.segment == nullptr) return {0, c};
    const int start = route.segment[c];
    return start < 0 ? Chain{0, 0} : Chain{(u32)start, c};
  }

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

  // One symbol of every chain; `entries` are already those of depth d + 1.
  __device__ void step_chains(u32 d) {
    u32 alive = 0, drop = 0;
    const u32 T = route.T;
    const bool keep = d + 1 >= route.min_length;
    for (u32 c = threadIdx.x; c < T; c += blockDim.x) {
      const u32 t = c + d;
      Chain s = d == 0 ? initial(c) : unpack(chains[c]);
      const bool was = s.b > s.a;
      if (was && same_segment(route, c, t)) {
        const u32 x = q.at(t);
        const u32 before = s.b - s.a;
        u32 a[1 + CF], b[1 + CF];
        if (CF) {
          level.step_all(s, x, a, b);
        } else {
          const Chain n = level.step(s, x);
          a[0] = n.a, b[0] = n.b;
        }
        const bool now = b[0] > a[0];
        if (now) {
          ++alive;
          if (keep) {
            route.position[t] = (int)entries[b[0] - 1];
            route.length[t] = (int)(d + 1);
          }
        }
        if (d == 0 && !(now && keep)) route.position[t] = -1, route.length[t] = 0;
        write_flips(t, a, b, d == 0, keep);
        drop += 32 - __clz(before) - (now ? 32 - __clz(b[0] - a[0]) : 0);
        chains[c] = now ? pack(a[0], b[0]) : DEAD;
      } else if (d == 0 || was) {
        chains[c] = DEAD;
        if (d == 0) {
          route.position[c] = -1, route.length[c] = 0;
#pragma unroll
          for (int m = 0; m < CF; ++m) route.flipped[(size_t)c * CF + m] = -1;
        }
      }
    }
    for (int step = 16; step; step /= 2) {
      alive += __shfl_xor_sync(FULL, alive, step);
      drop += __shfl_xor_sync(FULL, drop, step);
    }
    if (lane_id() == 0) {
      atomicAdd(&control->alive, alive);
      atomicAdd(&control->drop, drop);
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

  // Results of one maximal run of long positions, whose first chain is c, at depth `depth`.
  __device__ void walk(u32 c, u32 depth) const {
    const u32 lane = lane_id();
    const u32 first = route.segment ? (u32)route.segment[c] : 0;
    u32 i = c + depth - 1;
    u32 p = entries[unpack(chains[c]).b - 1], l = depth;
    while (true) {
      if (l < route.max_length) {
        const u32 o = i + 1 + lane;
        const bool equal = l + lane < route.max_length && same_segment(route, i, o) &&
                           q.at(o) == k.at(p + lane);
        const u32 differ = ~__ballot_sync(FULL, equal);
        const u32 n = differ ? __ffs(differ) - 1 : 32;
        if (lane < n && l + 1 + lane >= route.min_length) {
          route.position[o] = (int)(p + 1 + lane);
          route.length[o] = (int)(l + 1 + lane);
        }
        i += n, p += n, l += n;
        if (n == 32) continue;
      }
      const u32 t = i + 1, at = t + 1 - depth;
      if (!same_segment(route, i, t) || !is_alive(at)) return;
      const Chain s = unpack(chains[at]);
      u32 best, entry;
      // An older match of the same length may go on where the latest one ends: hence l + 1.
      const u32 bound = l < route.max_length ? l + 1 : l;
      search(s.a, s.b, 0, t + 1, depth, bound, first, best, entry);
      i = t, p = entry, l = best;
      if (lane == 0 && l >= route.min_length) {
        route.position[i] = (int)p;
        route.length[i] = (int)l;
      }
    }
  }

  __device__ void walk_all(u32 depth) {
    const u32 words = (route.T + 31) / 32;
    for (u32 w = warp_id(); w < words; w += warp_count()) {
      const u32 c = w * 32 + lane_id();
      const Chain s = c < route.T ? unpack(chains[c]) : Chain{0, 0};
      const u32 word = __ballot_sync(FULL, s.b > s.a);
      if (lane_id() == 0) alive_words[w] = word;
    }
    if (threadIdx.x == 0) control->next_word = 0, alive_words[words] = 0;
    __syncthreads();
    while (true) {
      u32 w = lane_id() == 0 ? atomicAdd(&control->next_word, 1u) : 0;
      w = __shfl_sync(FULL, w, 0);
      if (w >= words) break;
      const u32 word = alive_words[w];
      u32 starts = word & ~(word << 1 | (w ? alive_words[w - 1] >> 31 : 0));
      while (starts) {
        walk(w * 32 + __ffs(starts) - 1, depth);
        starts &= starts - 1;
      }
    }
    __syncthreads();
  }

  // Counterfactual positions deeper than the levels: the flipped symbol after a long match.
  __device__ void long_flips(u32 depth) {
    advance();
    const u32 T = route.T;
    for (u32 base = warp_id() * 32; base < T; base += warp_count() * 32) {
      if (alive_words[base >> 5] == 0) continue;
      const u32 c = base + lane_id(), t = c + depth;
      u32 a[1 + CF] = {}, b[1 + CF] = {};
      const bool on = c < T && is_alive(c) && same_segment(route, c, t);
      if (on) {
        level.step_all(unpack(chains[c]), q.at(t), a, b);
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

  __device__ void run(u32 min_depth, u32 max_depth) {
    const u32 T = route.T;
    for (u32 p = threadIdx.x; p < blocks * 64; p += blockDim.x) entries[p] = (Index)min(p, T);
    __syncthreads();
    u32 depth = 0, alive, drop;
    do {
      if (threadIdx.x == 0) control->alive = 0, control->drop = 0;
      advance();
      step_chains(depth);
      __syncthreads();
      alive = control->alive;
      drop = control->drop;
      ++depth;
      __syncthreads();
      if (alive == 0 || depth >= route.max_length) return;
    } while (depth < min_depth || (depth < max_depth && drop * 4 > T));
    walk_all(depth);
    if (CF) long_flips(depth);
  }
};

template <int SB>
__device__ void load_symbols(const u8* source, u32* words, u32 T) {
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
  PackedChain* chains;
  u8* q_words[2];         // for 4-bit and for 8-bit symbols, and so below
  u8* k_words[2];
  u8* ranks[2];

  __device__ Workspace(u8* shared, u8* global, u32 T, u32 blocks) {
    const size_t entry_bytes = (size_t)blocks * 64 * sizeof(Index);
    control = (Control*)carve(shared, sizeof(Control));
    bases = (u32*)carve(shared, 2 * SUPERBLOCKS * 16 * 4);
    alive_words = (u32*)carve(shared, (T / 32 + 2) * 4);
    entries = (Index*)carve(ENTRIES_SHARED ? shared : global, entry_bytes);
    spare = (Index*)carve(ENTRIES_SHARED ? shared : global, entry_bytes);
    chains = (PackedChain*)carve(CHAINS_SHARED ? shared : global, (size_t)T * sizeof(PackedChain));
    // Two places each: one for 4-bit symbols, one twice the size for 8-bit symbols.
    two_places(q_words, Q_SHARED, shared, global, ((size_t)T + 1) / 2 + 16);
    two_places(k_words, K_SHARED, shared, global, ((size_t)T + 1) / 2 + 16);
    two_places(ranks, RANK_SHARED, shared, global, rank_bytes(blocks));
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
__device__ void solve(const Workspace& w, const Route& route, const u8* q, const u8* k,
                      u32 super_shift, u32 min_depth, u32 max_depth) {
  const u32 blocks = (route.T + 63) / 64;
  u32* q_words = (u32*)w.q_words[SB == 8];
  u32* k_words = (u32*)w.k_words[SB == 8];
  u8* ranks = w.ranks[SB == 8];
  load_symbols<SB>(q, q_words, route.T);
  load_symbols<SB>(k, k_words, route.T);
  Matcher<SB> m;
  m.route = route;
  m.q.words = q_words;
  m.k.words = k_words;
  u8* second = ranks + rank_bytes(blocks);
  m.level.rank0 = {(uint4*)ranks, (u16*)(ranks + (size_t)blocks * 32), w.bases, super_shift};
  m.level.rank1 = {(uint4*)second, (u16*)(second + (size_t)blocks * 32),
                   w.bases + SUPERBLOCKS * 16, super_shift};
  m.entries = w.entries;
  m.spare = w.spare;
  m.chains = w.chains;
  m.alive_words = w.alive_words;
  m.control = w.control;
  m.blocks = blocks;
  __syncthreads();
  m.run(min_depth, max_depth);
  __syncthreads();
}

// q, k: [routes][T]; segments: [routes / routes_per_row][T] or null; position, length: [routes][T];
// flipped: [routes][T][CF]; scratch: scratch_stride bytes a thread block.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
suffix_match(const u8* __restrict__ q, const u8* __restrict__ k, const int* __restrict__ segments,
             int* position, int* length, int* flipped, u8* scratch, size_t scratch_stride,
             u32 routes, u32 routes_per_row, u32 T, u32 max_length, u32 min_length, u32 super_shift,
             u32 min_depth, u32 max_depth) {
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
    if (threadIdx.x == 0) w.control->high_digit = 0;
    __syncthreads();
    u32 high = 0;
    for (u32 i = threadIdx.x; i < T; i += blockDim.x) high |= q[offset + i] | k[offset + i];
    if (high >= 16) w.control->high_digit = 1;
    __syncthreads();
    if (CF > 4 || w.control->high_digit) {
      solve<8>(w, route, q + offset, k + offset, super_shift, min_depth, max_depth);
    } else {
      solve<4>(w, route, q + offset, k + offset, super_shift, min_depth, max_depth);
    }
  }
}
