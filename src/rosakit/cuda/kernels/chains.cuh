// Entries and chains of match.cu: how they are packed. See there for the macros.

#if INDEX_BYTES == 2
typedef u16 Index;
#else
typedef u32 Index;
#endif

// Loads in flight at a time: more where entries and chains are in global memory.
constexpr int BATCH = ENTRIES_SHARED ? 2 : 4;

struct Chain { u32 a, b; };
#ifndef LARGE_RANGE
#define LARGE_RANGE 0x7fff  // 15 bits
#endif
#ifndef WARP_SEARCH
#define WARP_SEARCH 512  // entries that one warp searches; more, and the whole block does
#endif

#if INDEX_BYTES == 2 || NARROW_CHAINS
typedef u32 PackedChain;
constexpr PackedChain DEAD = INDEX_BYTES == 2 ? 1u : 0xffffffffu;
#else
typedef uint2 PackedChain;
#define DEAD make_uint2(1, 0)
#endif

// The chains of a block: the first and the last entry of each range, so that 65536 entries fit 16
// bits. Up to 131072 entries 32 bits do as well: 17 for the first, 15 for the size; the last entry
// of a larger range is kept apart. Chains in global memory are streamed past the cache.
struct Chains {
  PackedChain* packed;
  u32* large;              // last entries of large ranges, only with NARROW_CHAINS
  static constexpr u32 LARGE = LARGE_RANGE;

  __device__ __forceinline__ PackedChain fetch(u32 c) const {
#if CHAINS_SHARED || defined(ROSAKIT_EMULATE)
    return packed[c];
#else
    return __ldcs(packed + c);
#endif
  }
  __device__ __forceinline__ void keep(u32 c, PackedChain s) const {
#if CHAINS_SHARED || defined(ROSAKIT_EMULATE)
    packed[c] = s;
#else
    __stcs(packed + c, s);
#endif
  }
  __device__ __forceinline__ void put(u32 c, Chain s) const {
#if INDEX_BYTES == 2
    keep(c, s.a | (s.b - 1) << 16);
#elif NARROW_CHAINS
    const u32 more = s.b - 1 - s.a;
    if (more >= LARGE) large[c] = s.b - 1;
    keep(c, s.a | (more < LARGE ? more + 1 : 0) << 17);  // size 0: kept apart
#else
    keep(c, make_uint2(s.a, s.b - 1));
#endif
  }
  __device__ __forceinline__ void kill(u32 c) const { keep(c, DEAD); }
  __device__ __forceinline__ Chain open(u32 c, PackedChain s) const {
#if INDEX_BYTES == 2
    return {s & 0xffffu, (s >> 16) + 1};
#elif NARROW_CHAINS
    if (s == DEAD) return {0, 0};
    const u32 first = s & 0x1ffffu, size = s >> 17;
    return {first, size ? first + size : large[c] + 1};
#else
    return {s.x, s.y + 1};
#endif
  }
  __device__ __forceinline__ Chain get(u32 c) const { return open(c, fetch(c)); }
};
