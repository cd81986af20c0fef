// One level of the index as a chain sees it: the image of a range under a symbol, and under every
// symbol with one flipped bit. One or two digits of four bits a symbol; up to eight with wide
// symbols (uint16, int32), where only those are looked at that some symbol of the route uses.

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

constexpr u32 MAX_DIGITS = WIDE == 2 ? 4 : 8;

template <>
struct Level<32> {
  u8* ranks;               // [digits] rank structures of `blocks` blocks, one behind the other
  u32* bases;              // [digits][SUPERBLOCKS][16]
  u32 blocks, super_shift, digits;

  __device__ __forceinline__ Rank rank_of(u32 w) const {
    u8* at = ranks + (size_t)w * rank_bytes(blocks);
    return {(uint4*)at, (u16*)(at + (size_t)blocks * 32), bases + w * SUPERBLOCKS * 16,
            super_shift};
  }
  __device__ __forceinline__ Chain step(Chain s, u32 x) const {
    for (u32 w = 0; w < digits; ++w, x >>= 4) {
      const Rank r = rank_of(w);
      s = {rank<false>(r, s.a, x & 15), rank<true>(r, s.b - 1, x & 15)};
      if (s.b <= s.a) return {0, 0};
    }
    return s;
  }
  __device__ __forceinline__ void step_all(Chain s, u32 x, u32* a, u32* b) const {
#pragma unroll
    for (int m = 0; m <= CF; ++m) {
      const Chain n = step(s, m ? x ^ (1u << (m - 1)) : x);
      a[m] = n.a, b[m] = n.b;
    }
  }
};
