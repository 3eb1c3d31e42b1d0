// Masked AdamW (Loshchilov and Hutter, arXiv 1711.05101) over a module table, and the sums of squares that clip it.
//
//   g ← clip·g,  m ← m + (1 − β₁)(g − m),  v ← β₂v + (1 − β₂)g²,  w ← keep·w − step_size·m / (√v·inverse_root + ε)
//   keep = 1 − lr·decay,  step_size = lr/(1 − β₁ᵗ),  inverse_root = 1/√(1 − β₂ᵗ): by the host in f64
//   clip = min(1, max_grad_norm / (√Σ squares + 1e-6)): in f64, once a step, by a kernel of one block
//   where Σ squares is not finite, nothing is written
//
// Weights bf16; gradients and moments each f32 or bf16: the last two words of a symbol. A frozen module has no row and
// costs nothing. The table lies in device memory; pointers need the alignment of their element only: a module not
// aligned to 16 bytes goes element by element.
//
//   kernel                          bytes an element     FLOPs   7.6e9 elements (Qwen2.5-7B), 3.0 TB/s
//   adamw_masked_*_bf16_bf16        14                   14      35.5 ms
//   adamw_masked_*_bf16_f32         22                   14      55.7 ms
//   adamw_masked_*_f32_bf16         16                   14      40.5 ms
//   adamw_masked_*_f32_f32          24                   14      60.8 ms
//   sum_squares_*_bf16 / _f32       2 / 4                2       5.1 / 10.1 ms
//   adamw_means_*                   10                   3       25.3 ms
//   adamw_proximal_*_bf16 / _f32    8 / 12               3       20.3 / 30.4 ms
//
// Beside the step: means, an exponential moving average, mean ← decay·mean + (1 − decay)·w, each product and the sum
// rounded, as on the host; proximal, g ← g + rho·(w − anchor), which has to come before the norm of the gradients.
// Kernels of their own: as operands of the step they would save the 2 bytes of w, and cost every step registers.
//
// Rounding. What is stored as bf16 is rounded once, from f32; the step itself uses the unrounded moments. Stochastic:
// up with the probability of what is cut off / the distance of the neighbours, so that the expectation is exact and
// representable values stay. Weights need it because an update is mostly less than half a unit of theirs (2⁻⁹ to 2⁻⁸ of
// the weight); bf16 moments because 1 − β₂ = 0.001 is less than half a unit, too: to nearest, a second moment could
// never decay. 16 random bits an element and tensor, as many as are cut off: key = seed, stream = step·2³² + tensor·2³⁰
// + module (tensor 0 weight, 1 m, 2 v), block = element / 8, word j of which serves elements 2j (low half) and 2j + 1.
// The result depends neither on the launch nor on alignment.
//
// Order of sums: squares in f64 (groups of eight bf16 in f32: exact products, a tree; four f32 one by one): a
// thread's groups in order, threads by halves, chunks in the same way; then tensors in the same way. Instructions:
// about 60 an element with 3 Philox blocks for 8, of the 130 that 14 bytes leave time for. Loads are all under way
// before the first is used, 64 to 112 bytes a thread. Where one of them is f32, threads take two groups of four, so
// that neighbours access neighbouring 16 bytes of f32 (and 8 of bf16); two then draw the same Philox block.
//
// Versions: baseline, an element a thread, a launch a module (the norm: a block a tensor); vec8, 16 bytes an access,
// one launch over all modules, a block a chunk: wins at every size. A chunk is a multiple of 2048 elements that the
// host chooses: of the norm always the same, for its sums depend on it; of the step as large as still fills the
// device, for each block first looks for its module. No shared memory beyond reductions: no bank conflicts.
#include "philox.cuh"
#include "vec8.cuh"

// A module of the table; `first_chunk` counts the chunks of the rows before it.
template <class Grad, class Moment> struct Module {
  bf16* weight;
  const Grad* grad;
  Moment* m;
  Moment* v;
  uint64_t len;
  uint64_t first_chunk;
};

// A moving average and the weight that it follows.
struct MeanRow {
  float* mean;
  const bf16* weight;
  uint64_t len;
  uint64_t first_chunk;
};

// A gradient, its weight, and what the weight is held near.
template <class Grad> struct ProximalRow {
  Grad* grad;
  const bf16* weight;
  const bf16* anchor;
  uint64_t len;
  uint64_t first_chunk;
};

// A tensor whose squares are summed.
template <class T> struct Part {
  const T* values;
  uint64_t len;
  uint64_t first_chunk;
};

// The row that holds this chunk: the last that begins at or before it. Every thread looks by itself, all at the same
// words; empty rows begin where the next does.
template <class Row> __device__ __forceinline__ uint32_t row_of_chunk(const Row* table, uint32_t rows, uint64_t chunk) {
  uint32_t row = 0, end = rows;
  while (end - row > 1) {
    const uint32_t middle = (row + end) / 2;
    if (table[middle].first_chunk <= chunk) row = middle;
    else end = middle;
  }
  return row;
}

// The elements of a block's chunk.
struct Range {
  uint64_t first, end;
  template <class Row> __device__ __forceinline__ Range(const Row& row, uint64_t chunk)
      : first((blockIdx.x - row.first_chunk) * chunk), end(row.len - first < chunk ? row.len : first + chunk) {}
};

// The factor on all gradients; NaN where the sum of squares is not finite.
// grid: 1, block: 256, 2 KiB for sums
extern "C" __global__ void __launch_bounds__(256) adamw_clip_factor(const float* squares, uint32_t modules,
    float max_grad_norm, float* clip) {
  double sum = 0.0;
  for (uint32_t i = threadIdx.x; i < modules; i += THREADS) sum += (double)squares[i];
  sum = block_sum_f64(sum);
  if (threadIdx.x == 0) *clip = sum < INFINITY ? (float)fmin(1.0, (double)max_grad_norm / (sqrt(sum) + 1e-6)) : NAN;
}
EXPORT(adamw_clip_factor)

struct Factors {
  float clip, beta1, beta2, inverse_root, eps, keep, step_size;
};

__device__ __forceinline__ void adamw_step(float& w, float g, float& m, float& v, const Factors& f) {
  g *= f.clip;
  m = fmaf(1.f - f.beta1, g - m, m);
  v = fmaf(f.beta2, v, (1.f - f.beta2) * g * g);
  const float denominator = fmaf(sqrt_approx(v), f.inverse_root, f.eps);
  w = fmaf(w, f.keep, -f.step_size * (m * rcp_approx(denominator)));
}

// One of the two bf16 neighbours of x; NaN as it is.
__device__ __forceinline__ float round_stochastically(float x, uint32_t bits16) {
  return x == x ? __uint_as_float((__float_as_uint(x) + bits16) & 0xffff0000u) : x;
}
__device__ __forceinline__ uint64_t rounding_stream(uint32_t step, uint32_t tensor, uint32_t module) {
  return (uint64_t)step << 32 | tensor << 30 | module;
}
// A group of eight elements from `element` on, or of the first or last four of eight.
template <int N> __device__ __forceinline__ void round_group(float (&x)[N], uint64_t seed, uint64_t stream,
    uint64_t element) {
  const uint4 words = philox(seed, stream, element / 8);
  const bool upper = N == 4 && element % 8 != 0;
  const uint32_t word[4] = {upper ? words.z : words.x, upper ? words.w : words.y, words.z, words.w};
#pragma unroll
  for (int j = 0; j < N; j++) x[j] = round_stochastically(x[j], j % 2 ? word[j / 2] >> 16 : word[j / 2] & 0xffffu);
}
__device__ __forceinline__ float round1(float x, uint64_t seed, uint64_t stream, uint64_t element) {
  const uint4 words = philox(seed, stream, element / 8);
  const uint32_t j = element % 8, word = j < 2 ? words.x : j < 4 ? words.y : j < 6 ? words.z : words.w;
  return round_stochastically(x, j % 2 ? word >> 16 : word & 0xffffu);
}

template <class Grad, class Moment>
__device__ __forceinline__ void adamw_baseline(bf16* weight, const Grad* grad, Moment* m, Moment* v, uint64_t len,
    uint32_t module, const float2* rates, const float* clip, float beta1, float beta2, float inverse_root, float eps,
    uint64_t seed, uint32_t step, uint32_t stochastic) {
  const uint64_t i = (uint64_t)blockIdx.x * THREADS + threadIdx.x;
  if (*clip != *clip || i >= len) return;
  const Factors factors = {*clip, beta1, beta2, inverse_root, eps, rates[module].x, rates[module].y};
  float w1 = to_float(weight[i]), m1 = to_float(m[i]), v1 = to_float(v[i]);
  adamw_step(w1, to_float(grad[i]), m1, v1, factors);
  if (sizeof(Moment) == 2 && stochastic) m1 = round1(m1, seed, rounding_stream(step, 1, module), i);
  from_float(m[i], m1);
  if (sizeof(Moment) == 2 && stochastic) v1 = round1(v1, seed, rounding_stream(step, 2, module), i);
  from_float(v[i], v1);
  if (stochastic) w1 = round1(w1, seed, rounding_stream(step, 0, module), i);
  from_float(weight[i], w1);
}

template <class Grad, class Moment>
__device__ __forceinline__ void adamw_vec8(const Module<Grad, Moment>* table, const float2* rates, const float* clip,
    uint32_t modules, uint32_t chunk, float beta1, float beta2, float inverse_root, float eps, uint64_t seed,
    uint32_t step, uint32_t stochastic) {
  const float factor = *clip;
  if (factor != factor) return;
  const uint32_t module = row_of_chunk(table, modules, blockIdx.x);
  const Module<Grad, Moment> row = table[module];
  const Factors factors = {factor, beta1, beta2, inverse_root, eps, rates[module].x, rates[module].y};
  const bool aligned = aligned16(row.weight) && aligned16(row.grad) && aligned16(row.m) && aligned16(row.v);
  const auto [first, end] = Range(row, chunk);
  constexpr int N = sizeof(Grad) == 2 && sizeof(Moment) == 2 ? 8 : 4, GROUPS = 8 / N;
#pragma unroll 1
  for (uint64_t element = first + N * threadIdx.x; element < end; element += 8 * THREADS) {
    float w[GROUPS][N], g[GROUPS][N], m[GROUPS][N], v[GROUPS][N];
    if (aligned && element + (GROUPS - 1) * N * THREADS + N <= end) {  // one branch: all loads are under way at once
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        const uint64_t from = element + i * N * THREADS;
        load_group<true>(row.weight + from, w[i]);
        load_group<true>(row.grad + from, g[i]);
        load_group<true>(row.m + from, m[i]);
        load_group<true>(row.v + from, v[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        const uint64_t from = element + i * N * THREADS;
        const bool group = aligned && from + N <= end;
        load<true>(row.weight, from, end, group, w[i]);
        load<true>(row.grad, from, end, group, g[i]);
        load<true>(row.m, from, end, group, m[i]);
        load<true>(row.v, from, end, group, v[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      const uint64_t to = element + i * N * THREADS;
#pragma unroll
      for (int j = 0; j < N; j++) adamw_step(w[i][j], g[i][j], m[i][j], v[i][j], factors);
      if (stochastic) {
        round_group(w[i], seed, rounding_stream(step, 0, module), to);
        if (sizeof(Moment) == 2) {
          round_group(m[i], seed, rounding_stream(step, 1, module), to);
          round_group(v[i], seed, rounding_stream(step, 2, module), to);
        }
      }
      const bool group = aligned && to + N <= end;
      store<true>(row.weight, to, end, group, w[i]);
      store<true>(row.m, to, end, group, m[i]);
      store<true>(row.v, to, end, group, v[i]);
    }
  }
}

// grid: ceil(len / 256), block: 256, no shared memory
#define ADAMW_BASELINE(name, Grad, Moment) \
  extern "C" __global__ void __launch_bounds__(256) name(bf16* weight, const Grad* grad, Moment* m, Moment* v, \
      uint64_t len, uint32_t module, const float2* rates, const float* clip, float beta1, float beta2, \
      float inverse_root, float eps, uint64_t seed, uint32_t step, uint32_t stochastic) { \
    adamw_baseline(weight, grad, m, v, len, module, rates, clip, beta1, beta2, inverse_root, eps, seed, step, \
        stochastic); \
  } \
  EXPORT(name)
ADAMW_BASELINE(adamw_masked_baseline_f32_f32, float, float)
ADAMW_BASELINE(adamw_masked_baseline_f32_bf16, float, bf16)
ADAMW_BASELINE(adamw_masked_baseline_bf16_f32, bf16, float)
ADAMW_BASELINE(adamw_masked_baseline_bf16_bf16, bf16, bf16)

// grid: chunks of all modules, block: 256, 2 KiB for sums
#define ADAMW_VEC8(name, Grad, Moment, registers) \
  extern "C" __global__ void __maxnreg__(registers) name(const Module<Grad, Moment>* table, const float2* rates, \
      const float* clip, uint32_t modules, uint32_t chunk, float beta1, float beta2, float inverse_root, float eps, \
      uint64_t seed, uint32_t step, uint32_t stochastic) { \
    adamw_vec8(table, rates, clip, modules, chunk, beta1, beta2, inverse_root, eps, seed, step, stochastic); \
  } \
  EXPORT(name)
ADAMW_VEC8(adamw_masked_vec8_f32_f32, float, float, 64)
ADAMW_VEC8(adamw_masked_vec8_f32_bf16, float, bf16, 64)
ADAMW_VEC8(adamw_masked_vec8_bf16_f32, bf16, float, 64)
ADAMW_VEC8(adamw_masked_vec8_bf16_bf16, bf16, bf16, 78)

// grid: tensors, block: 256, 2 KiB for sums
#define SUM_SQUARES_BASELINE(name, T)                                                             \
  extern "C" __global__ void __launch_bounds__(256) name(const Part<T>* table, float* squares) {  \
    const Part<T> part = table[blockIdx.x];                                                       \
    double sum = 0.0;                                                                             \
    for (uint64_t i = threadIdx.x; i < part.len; i += THREADS) {                                  \
      const double x = (double)to_float(part.values[i]);                                          \
      sum += x * x;                                                                               \
    }                                                                                             \
    sum = block_sum_f64(sum);                                                                     \
    if (threadIdx.x == 0) squares[blockIdx.x] = (float)sum;                                       \
  }                                                                                               \
  EXPORT(name)
SUM_SQUARES_BASELINE(sum_squares_baseline_f32, float)
SUM_SQUARES_BASELINE(sum_squares_baseline_bf16, bf16)

// grid: chunks of all tensors, block: 256, 2 KiB for sums
#define SUM_SQUARES_CHUNKS(name, T) \
  extern "C" __global__ void __launch_bounds__(256) name(const Part<T>* table, double* sums, uint32_t tensors, \
      uint32_t chunk) { \
    const Part<T> part = table[row_of_chunk(table, tensors, blockIdx.x)]; \
    const Range range(part, chunk); \
    const double sum = squares_of_range<true>(part.values, range.first, range.end); \
    if (threadIdx.x == 0) sums[blockIdx.x] = sum; \
  } \
  EXPORT(name)
SUM_SQUARES_CHUNKS(sum_squares_chunks_vec8_f32, float)
SUM_SQUARES_CHUNKS(sum_squares_chunks_vec8_bf16, bf16)

// The chunks' sums of each tensor, of any type; an empty tensor has none.
// grid: tensors, block: 256, 2 KiB for sums
extern "C" __global__ void __launch_bounds__(256) sum_squares_tensors(const Part<float>* table, const double* sums,
    float* squares, uint32_t chunk) {
  const uint64_t first = table[blockIdx.x].first_chunk, chunks = (table[blockIdx.x].len + chunk - 1) / chunk;
  double sum = 0.0;
  for (uint64_t i = threadIdx.x; i < chunks; i += THREADS) sum += sums[first + i];
  sum = block_sum_f64(sum);
  if (threadIdx.x == 0) squares[blockIdx.x] = (float)sum;
}
EXPORT(sum_squares_tensors)

// grid: chunks of all rows, block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(256) adamw_means_vec8_bf16(const MeanRow* table, uint32_t rows,
    uint32_t chunk, float decay) {
  const MeanRow row = table[row_of_chunk(table, rows, blockIdx.x)];
  const float rest = 1.f - decay;
  const bool aligned = aligned16(row.mean) && aligned16(row.weight);
  const auto [first, end] = Range(row, chunk);
  constexpr int N = 4, GROUPS = 2;
  for (uint64_t element = first + N * threadIdx.x; element < end; element += GROUPS * N * THREADS) {
    float mean[GROUPS][N], w[GROUPS][N];
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      const uint64_t from = element + i * N * THREADS;
      const bool group = aligned && from + N <= end;
      load<true>(row.mean, from, end, group, mean[i]);
      load<true>(row.weight, from, end, group, w[i]);
    }
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      const uint64_t to = element + i * N * THREADS;
#pragma unroll
      for (int j = 0; j < N; j++) {
        mean[i][j] = __fadd_rn(__fmul_rn(decay, mean[i][j]), __fmul_rn(rest, w[i][j]));
      }
      store<true>(row.mean, to, end, aligned && to + N <= end, mean[i]);
    }
  }
}
EXPORT(adamw_means_vec8_bf16)

template <class Grad>
__device__ __forceinline__ void proximal_vec8(const ProximalRow<Grad>* table, uint32_t rows, uint32_t chunk,
                                              float rho) {
  const ProximalRow<Grad> row = table[row_of_chunk(table, rows, blockIdx.x)];
  const bool aligned = aligned16(row.grad) && aligned16(row.weight) && aligned16(row.anchor);
  const auto [first, end] = Range(row, chunk);
  constexpr int N = sizeof(Grad) == 2 ? 8 : 4, GROUPS = 8 / N;
  for (uint64_t element = first + N * threadIdx.x; element < end; element += GROUPS * N * THREADS) {
    float g[GROUPS][N], w[GROUPS][N], anchor[GROUPS][N];
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      const uint64_t from = element + i * N * THREADS;
      const bool group = aligned && from + N <= end;
      load<true>(row.grad, from, end, group, g[i]);
      load<true>(row.weight, from, end, group, w[i]);
      load<true>(row.anchor, from, end, group, anchor[i]);
    }
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      const uint64_t to = element + i * N * THREADS;
#pragma unroll
      for (int j = 0; j < N; j++) g[i][j] = fmaf(rho, w[i][j] - anchor[i][j], g[i][j]);
      store<true>(row.grad, to, end, aligned && to + N <= end, g[i]);
    }
  }
}

// grid: chunks of all rows, block: 256, no shared memory
#define ADAMW_PROXIMAL(name, Grad) \
  extern "C" __global__ void __launch_bounds__(256) name(const ProximalRow<Grad>* table, uint32_t rows, \
      uint32_t chunk, float rho) { \
    proximal_vec8(table, rows, chunk, rho); \
  } \
  EXPORT(name)
ADAMW_PROXIMAL(adamw_proximal_vec8_f32, float)
ADAMW_PROXIMAL(adamw_proximal_vec8_bf16, bf16)
