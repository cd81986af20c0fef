// Linear maps without bias of a few tokens, one warp an output: y[t][p] = W_p x[t][p], and what is
// added to it. Where one token decodes, weights are read once and launches are what costs.
//
// x is read in the weights' dtype and sums are float32. The product is rounded to the weights'
// dtype, then to that of y, then added and rounded again: what a chain of separate operators gives.
//
// Compile-time, dtypes as in format.cuh: X_SCALAR of x, SCALAR of the weights, Y_SCALAR of y and of
// what is added.

typedef Format<X_SCALAR> XReal;
typedef Format<SCALAR> WReal;
typedef Format<Y_SCALAR> YReal;

// A number of x as the weights' dtype has it, which is what a separate operator would read.
__device__ __forceinline__ float read(float x) {
  return X_SCALAR == SCALAR ? x : WReal::widen(WReal::narrow(x));
}

// Eight numbers from a 16-byte boundary on.
template <int KIND>
__device__ __forceinline__ void eight(const typename Format<KIND>::type* from, float* to) {
  constexpr u32 WORDS = KIND == 0 ? 8 : 4;
  u32 word[WORDS];
#pragma unroll
  for (u32 i = 0; i < WORDS / 4; ++i) {
    const uint4 four = ((const uint4*)from)[i];
    word[4 * i] = four.x, word[4 * i + 1] = four.y;
    word[4 * i + 2] = four.z, word[4 * i + 3] = four.w;
  }
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
    if constexpr (KIND == 0) to[i] = __uint_as_float(word[i]);
    else to[i] = Format<KIND>::widen((u16)(word[i / 2] >> i % 2 * 16));
  }
}

// x: token t and part p from x + t * x_token + p * x_part on; w0, w1, w2: [outputs][inputs]; onto:
// [tokens][outputs] or null, with one part; y: token t and part p from y + (t * parts + p) * outputs
// on. wide: inputs is a multiple of 8 and all rows begin on 16-byte boundaries. Grid: blocks of
// outputs, parts, tokens.
extern "C" __global__ void __launch_bounds__(256)
project(const XReal::type* __restrict__ x, const WReal::type* __restrict__ w0,
        const WReal::type* __restrict__ w1, const WReal::type* __restrict__ w2,
        const YReal::type* __restrict__ onto, YReal::type* __restrict__ y, u32 inputs, u32 outputs,
        u32 parts, u32 x_token, u32 x_part, u32 wide) {
  const u32 lane = threadIdx.x & 31, part = blockIdx.y, token = blockIdx.z;
  const u32 output = blockIdx.x * (blockDim.x / 32) + (threadIdx.x >> 5);
  if (output >= outputs) return;
  const WReal::type* w = (part == 0 ? w0 : part == 1 ? w1 : w2) + (size_t)output * inputs;
  const XReal::type* own = x + (size_t)token * x_token + (size_t)part * x_part;
  float sum = 0.0f;
  if (wide) {
#pragma unroll 4
    for (u32 i = 8 * lane; i < inputs; i += 256) {
      float a[8], b[8];
      eight<X_SCALAR>(own + i, a);
      eight<SCALAR>(w + i, b);
#pragma unroll
      for (u32 e = 0; e < 8; ++e) sum += read(a[e]) * b[e];
    }
  } else {
    for (u32 i = lane; i < inputs; i += 32) sum += read(XReal::widen(own[i])) * WReal::widen(w[i]);
  }
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (lane) return;
  const size_t at = ((size_t)token * parts + part) * outputs + output;
  YReal::type product = YReal::narrow(WReal::widen(WReal::narrow(sum)));
  if (onto) product = YReal::narrow(YReal::widen(onto[at]) + YReal::widen(product));
  y[at] = product;
}
