// What is longer than the levels of match.cu, and the flips behind it.

template <int SB>
struct Matcher : Levels<SB> {
  using Base = Levels<SB>;
  using Base::route, Base::q, Base::k, Base::level, Base::entries, Base::spare, Base::chains,
      Base::alive_words, Base::control, Base::advance, Base::step_chains, Base::settle_all,
      Base::write_capped, Base::NEAR;

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
