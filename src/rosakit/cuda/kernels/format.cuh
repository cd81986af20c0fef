// Numbers of the channels' dtypes: 0 float32, 1 bfloat16, 2 float16.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

template <int KIND> struct Format;
template <> struct Format<0> {
  typedef float type;
  static __device__ __forceinline__ float widen(float x) { return x; }
  static __device__ __forceinline__ float narrow(float x) { return x; }
};
template <> struct Format<1> {
  typedef u16 type;
  static __device__ __forceinline__ float widen(u16 x) { return __uint_as_float((u32)x << 16); }
  static __device__ __forceinline__ u16 narrow(float x) {  // to nearest, ties to even
    const u32 raw = __float_as_uint(x);
    if ((raw & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u16)((raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16);
  }
};
template <> struct Format<2> {
  typedef u16 type;
#ifdef ROSAKIT_EMULATE
  // The emulator covers the other two formats; this one differs in two instructions.
  static float widen(u16) { return 0.0f; }
  static u16 narrow(float) { return 0; }
#else
  static __device__ __forceinline__ float widen(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
  }
  static __device__ __forceinline__ u16 narrow(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
  }
#endif
};
