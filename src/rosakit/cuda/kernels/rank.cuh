// Shared by the matching kernels: packed symbols, rank over 16-ary digits, stable partition.
//
// A level of the index is an array of entries in sorted order and, for the digit that each entry
// carries, a rank structure: bit planes of 32 digits (one word a bit) and the counts of every digit
// before the middle of each block of 64. rank(p, x) is then one count and one popcount.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

constexpr u32 FULL = 0xffffffffu;
constexpr int SUPERBLOCKS = 128;  // at most: bases of 16 counts each, 32 bits wide

__device__ __forceinline__ u32 lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ u32 warp_id() { return threadIdx.x >> 5; }
__device__ __forceinline__ u32 warp_count() { return blockDim.x >> 5; }
__device__ __forceinline__ u32 below(u32 bit) { return (1u << bit) - 1u; }

// ---- packed symbols: 8 of 4 bits or 4 of 8 bits a word -----------------------------------------

template <int SYMBOL_BITS>
struct Symbols {
  const u32* words;
  static constexpr u32 PER_WORD = 32 / SYMBOL_BITS;
  static constexpr u32 SHIFT = SYMBOL_BITS == 4 ? 3 : 2;

  __device__ __forceinline__ u32 at(u32 i) const {
    return (words[i >> SHIFT] >> ((i & (PER_WORD - 1)) * SYMBOL_BITS)) & ((1u << SYMBOL_BITS) - 1);
  }
  __device__ __forceinline__ u32 digit(u32 i, u32 which) const {
    return (words[i >> SHIFT] >> ((i & (PER_WORD - 1)) * SYMBOL_BITS + 4 * which)) & 15u;
  }
  // The word of symbols [end - PER_WORD, end); symbols before index 0 read as 0.
  __device__ __forceinline__ u32 window(u32 end) const {
    if (end < PER_WORD) return end == 0 ? 0u : words[0] << ((PER_WORD - end) * SYMBOL_BITS);
    const u32 first = end - PER_WORD;
    const u32 at_word = first >> SHIFT;
    return __funnelshift_r(words[at_word], words[at_word + 1],
                           (first & (PER_WORD - 1)) * SYMBOL_BITS);
  }
};

// Wide symbols are not packed.
template <>
struct Symbols<32> {
  const u32* words;
  static constexpr u32 PER_WORD = 1;

  __device__ __forceinline__ u32 at(u32 i) const { return words[i]; }
  __device__ __forceinline__ u32 digit(u32 i, u32 which) const {
    return words[i] >> (4 * which) & 15u;
  }
  __device__ __forceinline__ u32 window(u32 end) const { return end ? words[end - 1] : 0u; }
};

// How many symbols the suffixes that end before q_end and k_end share, knowing the first `known`;
// never more than `limit`.
template <int SB>
__device__ __forceinline__ u32 common_suffix(const Symbols<SB>& q, u32 q_end, const Symbols<SB>& k,
                                             u32 k_end, u32 known, u32 limit) {
  u32 n = known;
  while (n < limit) {
    const u32 difference = q.window(q_end - n) ^ k.window(k_end - n);
    if (difference) {
      n += __clz(difference) / SB;
      break;
    }
    n += Symbols<SB>::PER_WORD;
  }
  return n < limit ? n : limit;
}

// ---- rank ---------------------------------------------------------------------------------------

struct Rank {
  uint4* planes;     // [2 * blocks]
  u16* counts;       // [blocks][16], before the middle of the block, within its superblock
  u32* bases;        // [superblocks][16], entries of smaller digits and of earlier superblocks
  u32 super_shift;   // block >> super_shift is its superblock

  __device__ __forceinline__ u32 base(u32 block, u32 x) const {
    return bases[(block >> super_shift) * 16 + x] + counts[block * 16 + x];
  }
};

__device__ __forceinline__ u32 plane_mask(const uint4& w, u32 x) {
  return (w.x ^ ((x & 1u) - 1u)) & (w.y ^ (((x >> 1) & 1u) - 1u)) &
         (w.z ^ (((x >> 2) & 1u) - 1u)) & (w.w ^ (((x >> 3) & 1u) - 1u));
}

__device__ __forceinline__ u32 digit_at(const uint4& w, u32 bit) {
  return ((w.x >> bit) & 1) | ((w.y >> bit) & 1) << 1 | ((w.z >> bit) & 1) << 2 |
         ((w.w >> bit) & 1) << 3;
}

// Bits of the words' half that lie before p (THROUGH: up to and with p).
template <bool THROUGH>
__device__ __forceinline__ u32 before(u32 p) {
  return ((THROUGH ? 2u : 1u) << (p & 31)) - 1u;
}

// Entries of `mask` before p, counted from the middle of p's block (a negative number wraps).
__device__ __forceinline__ u32 from_middle(u32 p, u32 mask, u32 low) {
  return (p & 32) ? __popc(mask & low) : 0u - __popc(mask & ~low);
}

// Where entries of digit x go in the partition by this digit: the place of the first one at or after
// p, or (THROUGH) the place behind the last one at or before p.
template <bool THROUGH>
__device__ __forceinline__ u32 rank(const Rank& r, u32 p, u32 x) {
  const u32 low = before<THROUGH>(p);
  return r.base(p >> 6, x) + from_middle(p, plane_mask(r.planes[p >> 5], x), low);
}

// ---- stable partition of the whole block's entries by one digit ---------------------------------

// Bytes that a rank structure over `blocks` blocks takes without its bases.
__host__ __device__ inline size_t rank_bytes(size_t blocks) { return blocks * 64; }

// `load(p)` is entry p, `digit_of(entry)` in 0..15 its digit, `next(entry)` what it becomes in
// `target`. BATCH blocks of 64 are loaded together: more where the entries are far away.
// `totals` is scratch of [16]. All threads of the block take part.
template <int BATCH, typename Index, typename Load, typename DigitOf, typename Next>
__device__ void partition(const Rank& r, u32 blocks, Index* target, u32* totals, Load load,
                          DigitOf digit_of, Next next) {
  const u32 lane = lane_id();
  const u32 supers = ((blocks - 1) >> r.super_shift) + 1;
  for (u32 super = warp_id(); super < supers; super += warp_count()) {
    const u32 begin = super << r.super_shift;
    const u32 end = min(blocks, (super + 1) << r.super_shift);
    u32 running = 0;
    for (u32 first = begin; first < end; first += BATCH) {
      u32 digits[2 * BATCH];
#pragma unroll
      for (u32 h = 0; h < 2 * BATCH; ++h) {
        digits[h] = first + h / 2 < end ? load(first * 64 + h * 32 + lane) : 0;
      }
#pragma unroll
      for (u32 h = 0; h < 2 * BATCH; ++h) digits[h] = digit_of((Index)digits[h]);
#pragma unroll
      for (u32 j = 0; j < BATCH; ++j) {
        const u32 block = first + j, d0 = digits[2 * j], d1 = digits[2 * j + 1];
        if (block >= end) break;
        uint4 low, high;
        low.x = __ballot_sync(FULL, d0 & 1);
        low.y = __ballot_sync(FULL, d0 & 2);
        low.z = __ballot_sync(FULL, d0 & 4);
        low.w = __ballot_sync(FULL, d0 & 8);
        high.x = __ballot_sync(FULL, d1 & 1);
        high.y = __ballot_sync(FULL, d1 & 2);
        high.z = __ballot_sync(FULL, d1 & 4);
        high.w = __ballot_sync(FULL, d1 & 8);
        const u32 own = __popc(plane_mask(lane < 16 ? low : high, lane & 15));
        const u32 other = __shfl_xor_sync(FULL, own, 16);
        if (lane < 16) {
          r.counts[block * 16 + lane] = (u16)(running + own);
          if (lane < 2) r.planes[block * 2 + lane] = lane ? high : low;
        }
        running += own + other;
      }
    }
    if (lane < 16) r.bases[super * 16 + lane] = running;
  }
  __syncthreads();
  for (u32 x = warp_id(); x < 16; x += warp_count()) {
    u32 carried = 0;
    for (u32 first = 0; first < supers; first += 32) {
      const u32 super = first + lane;
      const u32 own = super < supers ? r.bases[super * 16 + x] : 0;
      u32 sum = own;
      for (u32 step = 1; step < 32; step *= 2) {
        const u32 below_sum = __shfl_up_sync(FULL, sum, step);
        if (lane >= step) sum += below_sum;
      }
      if (super < supers) r.bases[super * 16 + x] = carried + sum - own;
      carried += __shfl_sync(FULL, sum, 31);
    }
    if (lane == 0) totals[x] = carried;
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < supers * 16; i += blockDim.x) {
    u32 smaller = 0;
    for (u32 x = 0; x < (i & 15); ++x) smaller += totals[x];
    r.bases[i] += smaller;
  }
  __syncthreads();
  for (u32 first = warp_id(); first < blocks; first += BATCH * warp_count()) {
    u32 entry[2 * BATCH];
#pragma unroll
    for (u32 h = 0; h < 2 * BATCH; ++h) {
      const u32 block = first + h / 2 * warp_count();
      entry[h] = block < blocks ? load(block * 64 + h % 2 * 32 + lane) : 0;
    }
#pragma unroll
    for (u32 j = 0; j < BATCH; ++j) {
      const u32 block = first + j * warp_count();
      if (block >= blocks) break;
      const uint4 low = r.planes[block * 2], high = r.planes[block * 2 + 1];
      const u32 x0 = digit_at(low, lane), x1 = digit_at(high, lane);
      const u32 to0 = r.base(block, x0) - __popc(plane_mask(low, x0) & ~below(lane));
      const u32 to1 = r.base(block, x1) + __popc(plane_mask(high, x1) & below(lane));
      target[to0] = (Index)next((Index)entry[2 * j]);
      target[to1] = (Index)next((Index)entry[2 * j + 1]);
    }
  }
  __syncthreads();
}
