// The levels of match.cu: the index of one route, and its chains a symbol at a time.

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
struct Levels {
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
};
