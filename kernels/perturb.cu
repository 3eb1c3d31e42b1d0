// Perturbed copies of a weight at equal relative norm: plus = w + f·n, minus = w − f·n, f = epsilon·‖w‖/‖n‖ (0 where
// ‖n‖ = 0), with one draw of n for both; out of place. w, plus, minus, a given n: bf16 of any length and alignment, one
// rounding (to nearest even) an output; minus may be null. n is a function of (seed, stream, element) alone:
// philox.cuh. Normals agree with the CPU's to 6e-4 at worst (next to a radius of 0), mostly to 1e-6.
//
// First passes: f64 partial sums of squares, of w and of n; then the copies, each block of which adds up the partial
// sums in the same order.
//   of a tensor    ≤ 512 ranges of equal length (a multiple of 2048): each a block, groups of eight as in vec8.cuh
//   of normals     cos² + sin² = 1: a whole group of eight has the sum of its four −2·ln u, without root or sine
//   of signs       their number
//   of A·Bᵀ        Σ (AᵀA)∘(BᵀB): a block an entry
//
//   kernel (both copies)            bytes an element  instructions  at 18944 × 3584 (Qwen2.5-7B), 3.0 TB/s
//   perturb_squares_vec8_bf16       2                 3             0.05 ms
//   perturb_squares_gaussian_f64    0                 18            0.04 ms at 28 T instructions/s
//   perturb_gaussian_*_bf16         6                 25            0.14 ms
//   perturb_rademacher_vec8_bf16    6                 20            0.14 ms
//   perturb_scale_vec8_bf16         6                 5             0.14 ms
//   perturb_given_vec8_bf16         8                 5             0.18 ms
//   perturb_low_rank_vec8_bf16      6                 5 + rank      0.14 ms
//   perturb_along_vec8_bf16         6 (one, in place) 3             0.14 ms
//
// Versions: baseline, an element a thread (gaussian only: the others differ in nothing but the draw); vec8, eight
// elements of two Philox blocks a thread, 16 bytes an access: wins at every size, a Philox block then serves four
// elements, not one. No shared memory beyond reductions: no bank conflicts.
#include "philox.cuh"
#include "vec8.cuh"

// Words as they are, block after block from `first` on: to check the stream.
// grid: ceil(blocks / 256), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(256) perturb_words_u32(uint32_t* to, uint64_t blocks, uint64_t first,
    uint64_t seed, uint64_t stream) {
  const uint64_t block = (uint64_t)blockIdx.x * THREADS + threadIdx.x;
  if (block >= blocks) return;
  const uint4 words = philox(seed, stream, first + block);
  to[4 * block] = words.x;
  to[4 * block + 1] = words.y;
  to[4 * block + 2] = words.z;
  to[4 * block + 3] = words.w;
}
EXPORT(perturb_words_u32)

// A factor of a low-rank direction, transposed: element i = row·rank + k of the draw, from block `first` of the stream,
// goes to to[k·rows + row]; with rank 1 this writes the normals in their order.
// grid: ceil(rows·rank / 1024), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(256) perturb_normals_f32(float* to, uint64_t rows, uint32_t rank,
    uint64_t first, uint64_t seed, uint64_t stream) {
  const uint64_t block = (uint64_t)blockIdx.x * THREADS + threadIdx.x;
  if (4 * block >= rows * rank) return;
  float n[4];
  normals4(seed, stream, first + block, n);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const uint64_t i = 4 * block + j;
    if (i < rows * rank) to[i % rank * rows + i / rank] = n[j];
  }
}
EXPORT(perturb_normals_f32)

// Partial sums of a tensor.
// grid: ceil(len / range), block: 256, 2 KiB for sums; range a multiple of 8
extern "C" __global__ void __launch_bounds__(256) perturb_squares_vec8_bf16(const bf16* w, uint64_t len, uint64_t range,
    double* sums) {
  const uint64_t first = blockIdx.x * range;
  const double sum = squares_of_range<false>(w, first, len - first < range ? len : first + range);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
EXPORT(perturb_squares_vec8_bf16)

// Partial sums of normals.
// grid: ceil(len / range), block: 256, 2 KiB for sums; range a multiple of 8
extern "C" __global__ void __launch_bounds__(256) perturb_squares_gaussian_f64(uint64_t len, uint64_t range,
    uint64_t seed, uint64_t stream, double* sums) {
  const uint64_t first = blockIdx.x * range, end = len - first < range ? len : first + range;
  double sum = 0.0;
  for (uint64_t i = first + 8 * threadIdx.x; i < end; i += 8 * THREADS) {
    if (i + 8 <= end) {
      const uint4 a = philox(seed, stream, i / 4), b = philox(seed, stream, i / 4 + 1);
      sum += (double)((squared_radius(a.x) + squared_radius(a.z)) + (squared_radius(b.x) + squared_radius(b.z)));
    } else {
      float n[8];
      normals4(seed, stream, i / 4, n);
      normals4(seed, stream, i / 4 + 1, n + 4);
      for (int j = 0; j < 8; j++) sum += i + j < end ? (double)n[j] * (double)n[j] : 0.0;
    }
  }
  sum = block_sum_f64(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
EXPORT(perturb_squares_gaussian_f64)

// Partial sums of A·Bᵀ from Aᵀ and Bᵀ as perturb_normals_f32 writes them, at [rank, rows], bt [rank, columns]: entry
// (i, j) of the Gram matrices' product by elements.
// grid: rank × rank, block: 256, 2 KiB for sums
extern "C" __global__ void __launch_bounds__(256) perturb_squares_low_rank_f64(const float* at, const float* bt,
    uint64_t rows, uint64_t columns, double* sums) {
  double a = 0.0, b = 0.0;
  const float *a0 = at + blockIdx.x * rows, *a1 = at + blockIdx.y * rows;
  const float *b0 = bt + blockIdx.x * columns, *b1 = bt + blockIdx.y * columns;
  for (uint64_t r = threadIdx.x; r < rows; r += THREADS) a += (double)a0[r] * (double)a1[r];
  for (uint64_t c = threadIdx.x; c < columns; c += THREADS) b += (double)b0[c] * (double)b1[c];
  a = block_sum_f64(a);
  b = block_sum_f64(b);
  if (threadIdx.x == 0) sums[blockIdx.y * gridDim.x + blockIdx.x] = a * b;
}
EXPORT(perturb_squares_low_rank_f64)

// f from the partial sums of w and n; where n has none, its squares are `n_squares`.
__device__ __forceinline__ float equal_norm_factor(float epsilon, const double* w_sums, uint32_t w_count,
    const double* n_sums, uint32_t n_count, double n_squares) {
  __shared__ float factor;
  double w = 0.0, n = 0.0;
  for (uint32_t i = threadIdx.x; i < w_count; i += THREADS) w += w_sums[i];
  for (uint32_t i = threadIdx.x; i < n_count; i += THREADS) n += n_sums[i];
  w = block_sum_f64(w);
  n = n_count ? block_sum_f64(n) : n_squares;
  if (threadIdx.x == 0) factor = n > 0.0 ? (float)((double)epsilon * sqrt(w / n)) : 0.f;
  __syncthreads();
  return factor;
}

__device__ __forceinline__ void write_pair(bf16* plus, bf16* minus, uint64_t first, uint64_t len, bool whole,
    const float (&w)[8], const float (&n)[8], float factor) {
  float copy[8];
#pragma unroll
  for (int j = 0; j < 8; j++) copy[j] = fmaf(n[j], factor, w[j]);
  store<false>(plus, first, len, whole, copy);
  if (!minus) return;
#pragma unroll
  for (int j = 0; j < 8; j++) copy[j] = fmaf(n[j], -factor, w[j]);
  store<false>(minus, first, len, whole, copy);
}

struct Gaussian {
  uint64_t seed, stream;
  __device__ __forceinline__ bool aligned() const { return true; }
  __device__ __forceinline__ void operator()(uint64_t first, uint64_t, bool, const float (&)[8], float (&n)[8]) const {
    normals4(seed, stream, first / 4, n);
    normals4(seed, stream, first / 4 + 1, n + 4);
  }
};
struct Rademacher {
  uint64_t seed, stream;
  __device__ __forceinline__ bool aligned() const { return true; }
  __device__ __forceinline__ void operator()(uint64_t first, uint64_t, bool, const float (&)[8], float (&n)[8]) const {
    const uint4 a = philox(seed, stream, first / 4), b = philox(seed, stream, first / 4 + 1);
    const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int j = 0; j < 8; j++) n[j] = __uint_as_float(0x3f800000u | (words[j] & 0x80000000u));
  }
};
struct Scale {
  __device__ __forceinline__ bool aligned() const { return true; }
  __device__ __forceinline__ void operator()(uint64_t, uint64_t, bool, const float (&w)[8], float (&n)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; j++) n[j] = w[j];
  }
};
struct Given {
  const bf16* direction;
  __device__ __forceinline__ bool aligned() const { return aligned16(direction); }
  __device__ __forceinline__ void operator()(uint64_t first, uint64_t len, bool whole, const float (&)[8],
      float (&n)[8]) const {
    load<false>(direction, first, len, whole, n);
  }
};

template <class Draw> __device__ __forceinline__ void perturb_vec8(const bf16* w, bf16* plus, bf16* minus, uint64_t len,
    float factor, const Draw draw) {
  const bool aligned = aligned16(w) && aligned16(plus) && aligned16(minus) && draw.aligned();
  const uint64_t stride = (uint64_t)gridDim.x * THREADS * 8;
#pragma unroll 1
  for (uint64_t first = ((uint64_t)blockIdx.x * THREADS + threadIdx.x) * 8; first < len; first += stride) {
    const bool whole = aligned && first + 8 <= len;
    float x[8], n[8];
    load<false>(w, first, len, whole, x);
    draw(first, len, whole, x, n);
    write_pair(plus, minus, first, len, whole, x, n, factor);
  }
}

// grid: ceil(len / 256), block: 256, 2 KiB for sums
extern "C" __global__ void __launch_bounds__(256) perturb_gaussian_baseline_bf16(const bf16* w, bf16* plus, bf16* minus,
    uint64_t len, float epsilon, const double* w_sums, uint32_t w_count, const double* n_sums, uint32_t n_count,
    uint64_t seed, uint64_t stream) {
  const float factor = equal_norm_factor(epsilon, w_sums, w_count, n_sums, n_count, 0.0);
  const uint64_t i = (uint64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= len) return;
  float n[4];
  normals4(seed, stream, i / 4, n);
  const float n1 = i % 4 == 0 ? n[0] : i % 4 == 1 ? n[1] : i % 4 == 2 ? n[2] : n[3];
  plus[i] = __float2bfloat16(fmaf(n1, factor, __bfloat162float(w[i])));
  if (minus) minus[i] = __float2bfloat16(fmaf(n1, -factor, __bfloat162float(w[i])));
}
EXPORT(perturb_gaussian_baseline_bf16)

// grid: any, block: 256, 2 KiB for sums
extern "C" __global__ void __launch_bounds__(256, 6) perturb_gaussian_vec8_bf16(const bf16* w, bf16* plus, bf16* minus,
    uint64_t len, float epsilon, const double* w_sums, uint32_t w_count, const double* n_sums, uint32_t n_count,
    uint64_t seed, uint64_t stream) {
  const float factor = equal_norm_factor(epsilon, w_sums, w_count, n_sums, n_count, 0.0);
  perturb_vec8(w, plus, minus, len, factor, Gaussian{seed, stream});
}
EXPORT(perturb_gaussian_vec8_bf16)

// grid: any, block: 256, 2 KiB for sums
extern "C" __global__ void __launch_bounds__(256, 6) perturb_rademacher_vec8_bf16(const bf16* w, bf16* plus,
    bf16* minus, uint64_t len, float epsilon, const double* w_sums, uint32_t w_count, uint64_t seed, uint64_t stream) {
  const float factor = equal_norm_factor(epsilon, w_sums, w_count, nullptr, 0, (double)len);
  perturb_vec8(w, plus, minus, len, factor, Rademacher{seed, stream});
}
EXPORT(perturb_rademacher_vec8_bf16)

// grid: any, block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(256, 6) perturb_scale_vec8_bf16(const bf16* w, bf16* plus, bf16* minus,
    uint64_t len, float epsilon) {
  perturb_vec8(w, plus, minus, len, epsilon, Scale{});
}
EXPORT(perturb_scale_vec8_bf16)

// grid: any, block: 256, 2 KiB for sums
extern "C" __global__ void __launch_bounds__(256, 6) perturb_given_vec8_bf16(const bf16* w, bf16* plus, bf16* minus,
    uint64_t len, float epsilon, const double* w_sums, uint32_t w_count, const double* n_sums, uint32_t n_count,
    const bf16* direction) {
  const float factor = equal_norm_factor(epsilon, w_sums, w_count, n_sums, n_count, 0.0);
  perturb_vec8(w, plus, minus, len, factor, Given{direction});
}
EXPORT(perturb_given_vec8_bf16)

// A warp makes tiles of 4 rows × 256 columns, a block of 32 × 256; at and bt as in perturb_squares_low_rank_f64,
// aligned to 16 bytes. Rows that begin off the grid of 16 bytes go element by element.
// grid: ceil(columns / 256) × any, block: 256, 2 KiB for sums
extern "C" __global__ void __launch_bounds__(256, 3) perturb_low_rank_vec8_bf16(const bf16* w, bf16* plus, bf16* minus,
    uint64_t rows, uint64_t columns, float epsilon, const double* w_sums, uint32_t w_count, const double* n_sums,
    uint32_t n_count, const float* at, const float* bt, uint32_t rank) {
  const float factor = equal_norm_factor(epsilon, w_sums, w_count, n_sums, n_count, 0.0);
  const bool aligned = aligned16(w) && aligned16(plus) && aligned16(minus) && columns % 8 == 0;
  const uint64_t column = (uint64_t)blockIdx.x * 256 + threadIdx.x % 32 * 8, warp = blockIdx.y * 8 + threadIdx.x / 32;
  if (column >= columns) return;
#pragma unroll 1
  for (uint64_t row = warp * 4; row < rows; row += (uint64_t)gridDim.y * 32) {
    float n[4][8] = {};
    for (uint32_t k = 0; k < rank; k++) {
      float b[8];
      load<false>(bt + k * columns, column, columns, aligned, b);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const float a = row + r < rows ? at[k * rows + row + r] : 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) n[r][j] = fmaf(a, b[j], n[r][j]);
      }
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
      if (row + r >= rows) continue;
      const uint64_t offset = (row + r) * columns;
      float x[8];
      load<false>(w + offset, column, columns, aligned, x);
      write_pair(plus + offset, minus ? minus + offset : nullptr, column, columns, aligned, x, n[r], factor);
    }
  }
}
EXPORT(perturb_low_rank_vec8_bf16)

// x += rho/√squares·direction, and nothing where squares is 0; one rounding.
// grid: ceil(len / 2048), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(256) perturb_along_vec8_bf16(bf16* x, const bf16* direction, uint64_t len,
    const float* squares, float rho) {
  const uint64_t first = ((uint64_t)blockIdx.x * THREADS + threadIdx.x) * 8;
  if (first >= len) return;
  const float total = *squares, factor = total > 0.f ? rho / sqrtf(total) : 0.f;
  const bool whole = aligned16(x) && aligned16(direction) && first + 8 <= len;
  float y[8], n[8];
  load<false>(x, first, len, whole, y);
  load<false>(direction, first, len, whole, n);
#pragma unroll
  for (int j = 0; j < 8; j++) y[j] = fmaf(factor, n[j], y[j]);
  store<false>(x, first, len, whole, y);
}
EXPORT(perturb_along_vec8_bf16)
