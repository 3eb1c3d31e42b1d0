// Gradient of a bias: dbias [n] = column sums of dY [rows, n] (+ dbias). dY bf16 anywhere, dbias f32 or bf16.
//
//   kernel                 bytes      FLOPs   at 8192 × 18944, 3.0 TB/s
//   gemm_bias_baseline_*   2·rows·n   rows·n  0.10 ms
//   gemm_bias_vec8_f32     2·rows·n   rows·n  0.10 ms
//
// Sums in f32, rounded once where dbias is bf16. Order: `vec8` writes a sum for each part of `part` rows: rows w, w +
// 8, … of the part in order for w = 0 … 7, then these eight in order; gemm_combine (gemm.cu) adds the parts in order.
//
// Versions: baseline, a column a thread, rows in order; vec8, 256 columns × `part` rows a block, 16 bytes an access
// where rows are aligned to that (else 2 bytes, neighbours by neighbouring lanes): wins from a few hundred rows on.
#include "gemm.cuh"

// grid: ceil(n / 256), block: 256, no shared memory
#define GEMM_BIAS_BASELINE(dtype, T)                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) gemm_bias_baseline_##dtype(                                        \
      const bf16* __restrict__ dy, T* __restrict__ dbias, uint32_t accumulate, uint32_t rows, uint32_t n) {            \
    const uint32_t column = blockIdx.x * 256 + threadIdx.x;                                                            \
    if (column >= n) return;                                                                                           \
    float sum = 0.f;                                                                                                   \
    for (uint32_t row = 0; row < rows; row++) sum += widen(dy[(size_t)row * n + column]);                              \
    narrow(dbias + column, accumulate ? widen(dbias[column]) + sum : sum);                                             \
  }                                                                                                                    \
  EXPORT(gemm_bias_baseline_##dtype)

GEMM_BIAS_BASELINE(bf16, bf16)
GEMM_BIAS_BASELINE(f32, float)

// grid: (ceil(n / 256), parts), block: 256, no dynamic shared memory
extern "C" __global__ void __launch_bounds__(256)
    gemm_bias_vec8_f32(const bf16* __restrict__ dy, float* __restrict__ sums, uint32_t rows, uint32_t n,
                       uint32_t part) {
  constexpr int WARPS = 8;
  __shared__ __align__(16) float warp_sums[WARPS][256];
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x & 31, column0 = blockIdx.x * 256;
  const uint32_t first = blockIdx.y * part, last = first + part < rows ? first + part : rows;
  const bool aligned = n % 8 == 0 && ((uint64_t)dy & 15) == 0;
  float columns[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  if (aligned) {
    if (column0 + 8 * lane < n) {
#pragma unroll 8
      for (uint32_t row = first + warp; row < last; row += WARPS) {
        float x[8];
        unpack8(load_streaming(reinterpret_cast<const uint4*>(dy + (size_t)row * n + column0 + 8 * lane)), x);
#pragma unroll
        for (int i = 0; i < 8; i++) columns[i] += x[i];
      }
    }
  } else {
    for (uint32_t row = first + warp; row < last; row += WARPS)
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (column0 + 32 * i + lane < n) columns[i] += widen(dy[(size_t)row * n + column0 + 32 * i + lane]);
  }
  if (aligned) {
    store4(&warp_sums[warp][8 * lane], make_float4(columns[0], columns[1], columns[2], columns[3]));
    store4(&warp_sums[warp][8 * lane + 4], make_float4(columns[4], columns[5], columns[6], columns[7]));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) warp_sums[warp][32 * i + lane] = columns[i];
  }
  __syncthreads();
  float sum = warp_sums[0][threadIdx.x];
#pragma unroll
  for (int w = 1; w < WARPS; w++) sum += warp_sums[w][threadIdx.x];
  if (column0 + threadIdx.x < n) sums[(size_t)blockIdx.y * n + column0 + threadIdx.x] = sum;
}
EXPORT(gemm_bias_vec8_f32)
