// Y [tokens, outputs] = alpha·X·Wᵀ + bias + residual + Y for the few tokens of decoding: reads each weight once, at the
// speed of memory. bf16, f32 sums. X and W aligned to 16 bytes, inputs a multiple of 8; the others may lie anywhere.
//
//   kernel               bytes              FLOPs                 at 1 × 18944 × 3584 (Qwen2.5-7B, up), 3.0 TB/s
//   gemm_tn_decode*      2·outputs·inputs   2·tokens·outputs·inputs   45 µs
//
// A warp computes ROWS rows of W at once, so that what it reads of X (from L1) serves ROWS times; `slices` warps (1,
// 2, 4 or 8) share the inputs of these rows, so that small layers fill the device, too.
//
// Rounding: once, when Y is stored. Sums: lane l of slice s adds the chunks of 8 inputs s·32 + l, + 32·slices, … in
// order; lanes are added by a butterfly (16, 8, 4, 2, 1), slices in ascending order. None of this depends on the
// number of tokens: a token's result is the same alone and among others.
//
// gemm_tn_each_decode*: up to three layers of one X in one launch, each with tensors of its own: the grid takes their
// blocks one after another.
//
// Versions: decode1, 2, 4, 8: up to that many tokens. No shared memory traffic but the sums of warps.
#include "gemm.cuh"

constexpr int ROWS = 4, WARPS = 8;

// Adds each of V (a power of two up to 32) values over the warp; lane l gets the sum of value l / (32 / V). A template
// a step: every index is known, and the values stay in registers.
template <int V, int Offset = 16> __device__ __forceinline__ float fold(const float (&values)[V]) {
  if constexpr (V > 1) {
    constexpr int HALF = V / 2;
    const bool upper = threadIdx.x & Offset;
    float halved[HALF];
#pragma unroll
    for (int i = 0; i < HALF; i++) {
      const float low = values[i], high = values[i + HALF];
      halved[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, Offset);
    }
    return fold<HALF, Offset / 2>(halved);
  } else {
    float sum = values[0];
#pragma unroll
    for (int offset = Offset; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    return sum;
  }
}

template <int Tokens>
__device__ __forceinline__ void decode(uint32_t block, const bf16* __restrict__ x, const bf16* __restrict__ w,
                                       uint32_t inputs, uint32_t slices, const Epilogue<bf16> epilogue) {
  constexpr int AHEAD = Tokens <= 4 ? 2 : 1, VALUES = ROWS * Tokens;
  __shared__ float parts[WARPS][VALUES];
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x & 31, slice = warp % slices;
  const uint32_t groups = WARPS / slices, row0 = (block * groups + warp / slices) * ROWS;
  const uint32_t chunks = inputs / 8, step = 32 * slices;
  const uint4* w_rows[ROWS];
  const uint4* x_rows[Tokens];
  // Rows and tokens past the end repeat the last; they are not stored.
#pragma unroll
  for (uint32_t r = 0; r < ROWS; r++) {
    const uint32_t row = row0 + r < epilogue.n ? row0 + r : epilogue.n - 1;
    w_rows[r] = reinterpret_cast<const uint4*>(w) + (size_t)row * chunks;
  }
#pragma unroll
  for (uint32_t t = 0; t < Tokens; t++)
    x_rows[t] = reinterpret_cast<const uint4*>(x) + (size_t)(t < epilogue.m ? t : epilogue.m - 1) * chunks;

  float sums[ROWS][Tokens];
#pragma unroll
  for (int r = 0; r < ROWS; r++)
#pragma unroll
    for (int t = 0; t < Tokens; t++) sums[r][t] = 0.f;
  for (uint32_t c0 = slice * 32 + lane; c0 < chunks; c0 += AHEAD * step) {
    uint4 bits[AHEAD][ROWS];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        if (i == 0 || c0 + i * step < chunks) bits[i][r] = load_streaming(w_rows[r] + c0 + i * step);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (i > 0 && c0 + i * step >= chunks) break;
      float weights[ROWS][8];
#pragma unroll
      for (int r = 0; r < ROWS; r++) unpack8(bits[i][r], weights[r]);
#pragma unroll
      for (int t = 0; t < Tokens; t++) {
        float inputs8[8];
        unpack8(x_rows[t][c0 + i * step], inputs8);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
          for (int e = 0; e < 8; e++) sums[r][t] = fmaf(weights[r][e], inputs8[e], sums[r][t]);
      }
    }
  }

  float values[VALUES];
#pragma unroll
  for (int i = 0; i < VALUES; i++) values[i] = sums[i / Tokens][i % Tokens];
  const float sum = fold<VALUES>(values);
  if (lane % (32 / VALUES) == 0) parts[warp][lane / (32 / VALUES)] = sum;
  __syncthreads();
  if (threadIdx.x >= groups * VALUES) return;
  const uint32_t group = threadIdx.x / VALUES, value = threadIdx.x % VALUES;
  float total = parts[group * slices][value];
  for (uint32_t s = 1; s < slices; s++) total += parts[group * slices + s][value];
  const uint32_t row = (block * groups + group) * ROWS + value / Tokens, token = value % Tokens;
  if (row < epilogue.n && token < epilogue.m) epilogue.store(token, row, total);
}

// grid: ceil(n / (32 / slices)), block: 256, no dynamic shared memory; m ≤ the number in the name
#define GEMM_DECODE(TOKENS)                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 2) gemm_tn_decode##TOKENS##_bf16(                                  \
      const bf16* __restrict__ x, const bf16* __restrict__ w, bf16* y, const bf16* __restrict__ bias,                  \
      const bf16* residual, float alpha, uint32_t accumulate, uint32_t m, uint32_t n, uint32_t k, uint32_t slices) {   \
    decode<TOKENS>(blockIdx.x, x, w, k, slices, {y, bias, residual, nullptr, alpha, accumulate != 0, m, n});           \
  }                                                                                                                    \
  EXPORT(gemm_tn_decode##TOKENS##_bf16)

GEMM_DECODE(1)
GEMM_DECODE(2)
GEMM_DECODE(4)
GEMM_DECODE(8)

// grid: sum of ceil(n / (32 / slices)), block: 256, no dynamic shared memory; a layer that is not there has no columns
#define GEMM_EACH_DECODE(TOKENS, BLOCKS)                                                                               \
  extern "C" __global__ void __launch_bounds__(256, BLOCKS) gemm_tn_each_decode##TOKENS##_bf16(                        \
      const bf16* __restrict__ x, const bf16* __restrict__ w0, const bf16* __restrict__ w1,                            \
      const bf16* __restrict__ w2, bf16* y0, bf16* y1, bf16* y2, const bf16* __restrict__ bias0,                       \
      const bf16* __restrict__ bias1, const bf16* __restrict__ bias2, uint32_t m, uint32_t n0, uint32_t n1,            \
      uint32_t n2, uint32_t k, uint32_t slices) {                                                                      \
    const uint32_t outputs = WARPS / slices * ROWS, second = (n0 + outputs - 1) / outputs;                             \
    const uint32_t third = second + (n1 + outputs - 1) / outputs;                                                      \
    const bool is_first = blockIdx.x < second, is_third = blockIdx.x >= third;                                         \
    const uint32_t first = is_first ? 0 : is_third ? third : second;                                                   \
    const bf16 *w = is_first ? w0 : is_third ? w2 : w1, *bias = is_first ? bias0 : is_third ? bias2 : bias1;           \
    bf16* y = is_first ? y0 : is_third ? y2 : y1;                                                                      \
    const uint32_t n = is_first ? n0 : is_third ? n2 : n1;                                                             \
    decode<TOKENS>(blockIdx.x - first, x, w, k, slices, {y, bias, nullptr, nullptr, 1.f, false, m, n});                \
  }                                                                                                                    \
  EXPORT(gemm_tn_each_decode##TOKENS##_bf16)

GEMM_EACH_DECODE(1, 3)
GEMM_EACH_DECODE(2, 2)
GEMM_EACH_DECODE(4, 2)
GEMM_EACH_DECODE(8, 2)
