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
// Levels (levels.cuh) stop when they no longer narrow the ranges, or when few candidates are left.
// Of the positions alive then, single threads finish those whose few candidates differ soon (without
// flips). The rest are *long* (walk.cuh): one warp a run of them extends the match while the next
// symbols agree (which is exact: a latest longest match that can be extended is the latest longest
// one of the next position) and searches its range where they do not.
//
// Compile-time: CF (flipped bits, 0..8, wide: 0..16), WIDE (bytes of a wide symbol, 2 or 4; 0: one
// byte), THREADS, MIN_BLOCKS, INDEX_BYTES (2 up to 65536 positions, else 4), NARROW_CHAINS (1: 4-byte
// entries, up to 131072 positions), and what lives in shared memory: ENTRIES_SHARED, CHAINS_SHARED
// (0, 1), RANK_SHARED, K_SHARED, Q_SHARED (0, 1: for 4-bit symbols only, 2: for 8-bit symbols too).

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
