// RMSNorm (Zhang and Sennrich, arXiv 1910.07467) over rows of `width`:
//   rstd = 1 / √(mean(x²) + eps),  y = bf16(x·rstd)·weight,
//   dx = rstd·(dy·weight − x·rstd²·mean(dy·weight·x)) (+ dx),  dweight = Σ_rows dy·x·rstd (+ dweight).
// x, y, dy, dx [rows, width], weight [width] bf16; rstd [rows] f32; dweight [width] f32 or bf16. f32 inside. The
// normalised value is rounded to bf16 before the product with the weight, as transformers does, y again after it; dx
// and dweight once.
//
//   kernel                      bytes an element     FLOPs   at 8192 × 3584 (Qwen2.5-7B), 3.0 TB/s
//   rmsnorm_forward_*           4                    4       39 µs
//   rmsnorm_backward_*          6 (8 accumulating)   11      59 µs (78 µs)
//   rmsnorm_backward_columns_*  4 a partial sum      1       1 µs, from the L2 cache
//
// dweight in two stages: a block sums its own run of rows (a fixed number of rows, chosen by the shape alone) into a
// row of `partial` [parts, width]; the column kernel adds the parts. Order of every sum: a thread over its elements,
// then the lanes (xor tree), then the warps (xor tree); dweight: rows of a part in steps of the groups of a block,
// then the groups in order; parts in steps of 32, then those 32 in order.
//
// Versions: baseline, scalar, a warp a row, any width and alignment. The others need a width that is a multiple of 8
// and pointers aligned to 16 bytes. lanes: width up to 256 (q and k norms), 2 to 32 lanes a row. warp: forward to
// 1024, a warp a row. rowN: width up to N, a block a row with the row in registers and one barrier a row; backward
// keeps the part's sums of dweight in registers too, and fetches the next row before it reduces this one. There, a
// vector a thread is 63 registers on sm_90, so that 32 warps of row4096 share a multiprocessor; two vectors are 113,
// for 16 warps. A row is read once in all but the baseline. Shared memory is read and written by consecutive lanes at
// consecutive words or 16-byte words: no bank conflicts.
#include "prelude.cuh"

__device__ __forceinline__ uint4 zeros() { return uint4{0, 0, 0, 0}; }
// Threads of the lanes kernels and of the baselines.
constexpr int BLOCK = 256;
// Rows that a group of lanes has under way at once.
constexpr int FORWARD_ROWS = 4, BACKWARD_ROWS = 2;

__device__ __forceinline__ float reciprocal_root(float squares, uint32_t width, float eps) {
  return 1.f / sqrtf(squares / (float)width + eps);
}
__device__ __forceinline__ float normalised(float x, float rstd) {
  return __bfloat162float(__float2bfloat16(x * rstd));
}

// Sums over aligned groups of `lanes` (a power of two) lanes; every lane takes part.
template <int Rows> __device__ __forceinline__ void group_sums(float (&sums)[Rows], uint32_t lanes) {
  for (uint32_t offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
    for (int r = 0; r < Rows; r++) sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], offset);
  }
}

__device__ __forceinline__ float squares8(uint4 bits) {
  float x[8], sum = 0.f;
  unpack8(bits, x);
#pragma unroll
  for (int j = 0; j < 8; j++) sum = fmaf(x[j], x[j], sum);
  return sum;
}
__device__ __forceinline__ uint4 scaled8(uint4 bits, uint4 weight, float rstd) {
  float x[8], w[8];
  unpack8(bits, x);
  unpack8(weight, w);
#pragma unroll
  for (int j = 0; j < 8; j++) x[j] = normalised(x[j], rstd) * w[j];
  return pack8(x);
}
// Σ dy·weight·x
__device__ __forceinline__ float dot8(uint4 dy, uint4 weight, uint4 x) {
  float d[8], w[8], v[8], sum = 0.f;
  unpack8(dy, d);
  unpack8(weight, w);
  unpack8(x, v);
#pragma unroll
  for (int j = 0; j < 8; j++) sum = fmaf(d[j] * w[j], v[j], sum);
  return sum;
}
__device__ __forceinline__ uint4 gradient8(uint4 dy, uint4 weight, uint4 x, uint4 old, float rstd, float projection) {
  float d[8], w[8], v[8], o[8];
  unpack8(dy, d);
  unpack8(weight, w);
  unpack8(x, v);
  unpack8(old, o);
#pragma unroll
  for (int j = 0; j < 8; j++) o[j] += rstd * (d[j] * w[j] - v[j] * projection);
  return pack8(o);
}
// sums += dy·x·rstd
__device__ __forceinline__ void add_weight_gradient8(float (&sums)[8], uint4 dy, uint4 x, float rstd) {
  float d[8], v[8];
  unpack8(dy, d);
  unpack8(x, v);
#pragma unroll
  for (int j = 0; j < 8; j++) sums[j] = fmaf(d[j], v[j] * rstd, sums[j]);
}

// ---- forward

// grid: ceil(rows / 8), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(BLOCK)
    rmsnorm_forward_baseline_bf16(const bf16* __restrict__ x, const bf16* __restrict__ weight, bf16* __restrict__ y,
                                  float* __restrict__ rstd, uint64_t rows, uint32_t width, float eps) {
  const uint64_t row = (uint64_t)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32;
  const uint32_t lane = threadIdx.x & 31;
  if (row >= rows) return;
  x += row * width;
  y += row * width;
  float squares = 0.f;
  for (uint32_t i = lane; i < width; i += 32) {
    const float v = __bfloat162float(x[i]);
    squares = fmaf(v, v, squares);
  }
  const float r = reciprocal_root(warp_sum(squares), width, eps);
  for (uint32_t i = lane; i < width; i += 32) {
    y[i] = __float2bfloat16(normalised(__bfloat162float(x[i]), r) * __bfloat162float(weight[i]));
  }
  if (rstd && lane == 0) rstd[row] = r;
}
EXPORT(rmsnorm_forward_baseline_bf16)

// grid: ceil(rows / (256 / lanes · 4)), block: 256, no shared memory
// lanes: the least power of two ≥ width / 8, at least 2
extern "C" __global__ void __launch_bounds__(BLOCK)
    rmsnorm_forward_lanes_bf16(const bf16* __restrict__ x, const bf16* __restrict__ weight, bf16* __restrict__ y,
                               float* __restrict__ rstd, uint64_t rows, uint32_t width, float eps, uint32_t lanes) {
  const uint32_t vectors = width / 8, lane = threadIdx.x & (lanes - 1), groups = BLOCK / lanes;
  const uint64_t first = (uint64_t)blockIdx.x * groups * FORWARD_ROWS + threadIdx.x / lanes;
  const bool inside = lane < vectors;
  const uint4* from = reinterpret_cast<const uint4*>(x) + lane;
  uint4* to = reinterpret_cast<uint4*>(y) + lane;
  uint4 v[FORWARD_ROWS];
#pragma unroll
  for (int r = 0; r < FORWARD_ROWS; r++) {
    const uint64_t row = first + r * groups;
    v[r] = inside && row < rows ? from[row * vectors] : zeros();
  }
  const uint4 w = inside ? reinterpret_cast<const uint4*>(weight)[lane] : zeros();
  float sums[FORWARD_ROWS];
#pragma unroll
  for (int r = 0; r < FORWARD_ROWS; r++) sums[r] = squares8(v[r]);
  group_sums(sums, lanes);
#pragma unroll
  for (int r = 0; r < FORWARD_ROWS; r++) {
    const uint64_t row = first + r * groups;
    const float scale = reciprocal_root(sums[r], width, eps);
    if (inside && row < rows) {
      to[row * vectors] = scaled8(v[r], w, scale);
      if (rstd && lane == 0) rstd[row] = scale;
    }
  }
}
EXPORT(rmsnorm_forward_lanes_bf16)

// A row by `Threads` threads, `Vectors` vectors each.
template <int Threads, int Vectors>
__device__ __forceinline__ void forward_row(const bf16* __restrict__ x, const bf16* __restrict__ weight,
                                            bf16* __restrict__ y, float* __restrict__ rstd, uint64_t row,
                                            uint32_t thread, uint32_t width, float eps) {
  const uint32_t vectors = width / 8;
  const uint4* from = reinterpret_cast<const uint4*>(x) + row * vectors;
  uint4* to = reinterpret_cast<uint4*>(y) + row * vectors;
  uint4 v[Vectors], w[Vectors];
#pragma unroll
  for (int k = 0; k < Vectors; k++) {
    const uint32_t i = thread + k * Threads;
    v[k] = i < vectors ? from[i] : zeros();
    w[k] = i < vectors ? reinterpret_cast<const uint4*>(weight)[i] : zeros();
  }
  float squares = 0.f;
#pragma unroll
  for (int k = 0; k < Vectors; k++) squares += squares8(v[k]);
  squares = Threads == 32 ? warp_sum(squares) : block_sum<Threads>(squares);
  const float r = reciprocal_root(squares, width, eps);
#pragma unroll
  for (int k = 0; k < Vectors; k++) {
    const uint32_t i = thread + k * Threads;
    if (i < vectors) to[i] = scaled8(v[k], w[k], r);
  }
  if (rstd && thread == 0) rstd[row] = r;
}

// grid: ceil(rows / 8), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(BLOCK)
    rmsnorm_forward_warp_bf16(const bf16* __restrict__ x, const bf16* __restrict__ weight, bf16* __restrict__ y,
                              float* __restrict__ rstd, uint64_t rows, uint32_t width, float eps) {
  const uint64_t row = (uint64_t)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32;
  if (row < rows) forward_row<32, 4>(x, weight, y, rstd, row, threadIdx.x & 31, width, eps);
}
EXPORT(rmsnorm_forward_warp_bf16)

// grid: rows, block: 128 (to 4096), 256; 256 bytes of shared memory
#define FORWARD_ROW(name, Threads, Vectors)                                                                         \
  extern "C" __global__ void __launch_bounds__(Threads)                                                             \
      name(const bf16* __restrict__ x, const bf16* __restrict__ weight, bf16* __restrict__ y,                       \
           float* __restrict__ rstd, uint64_t rows, uint32_t width, float eps) {                                    \
    if (blockIdx.x < rows) forward_row<Threads, Vectors>(x, weight, y, rstd, blockIdx.x, threadIdx.x, width, eps);   \
  }                                                                                                                 \
  EXPORT(name)
FORWARD_ROW(rmsnorm_forward_row2048_bf16, 128, 2)
FORWARD_ROW(rmsnorm_forward_row4096_bf16, 128, 4)
FORWARD_ROW(rmsnorm_forward_row8192_bf16, 256, 4)

// ---- backward

// grid: ceil(rows / 8), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(BLOCK)
    rmsnorm_backward_input_baseline_bf16(const bf16* __restrict__ dy, const bf16* __restrict__ x,
                                         const bf16* __restrict__ weight, const float* __restrict__ rstd,
                                         bf16* __restrict__ dx, uint64_t rows, uint32_t width, uint32_t accumulate) {
  const uint64_t row = (uint64_t)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32;
  const uint32_t lane = threadIdx.x & 31;
  if (row >= rows) return;
  dy += row * width;
  x += row * width;
  dx += row * width;
  float dot = 0.f;
  for (uint32_t i = lane; i < width; i += 32) {
    dot = fmaf(__bfloat162float(dy[i]) * __bfloat162float(weight[i]), __bfloat162float(x[i]), dot);
  }
  const float r = rstd[row], projection = warp_sum(dot) * r * r / (float)width;
  for (uint32_t i = lane; i < width; i += 32) {
    const float old = accumulate ? __bfloat162float(dx[i]) : 0.f;
    const float scaled = __bfloat162float(dy[i]) * __bfloat162float(weight[i]);
    dx[i] = __float2bfloat16(old + r * (scaled - __bfloat162float(x[i]) * projection));
  }
}
EXPORT(rmsnorm_backward_input_baseline_bf16)

// grid: (ceil(width / 256), parts), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(BLOCK)
    rmsnorm_backward_weight_baseline_bf16(const bf16* __restrict__ dy, const bf16* __restrict__ x,
                                          const float* __restrict__ rstd, float* __restrict__ partial, uint64_t rows,
                                          uint32_t rows_a_part, uint32_t width) {
  const uint32_t column = blockIdx.x * BLOCK + threadIdx.x;
  if (column >= width) return;
  const uint64_t first = (uint64_t)blockIdx.y * rows_a_part, end = min(first + rows_a_part, rows);
  float sum = 0.f;
  for (uint64_t row = first; row < end; row++) {
    const uint64_t i = row * width + column;
    sum = fmaf(__bfloat162float(dy[i]), __bfloat162float(x[i]) * rstd[row], sum);
  }
  partial[(uint64_t)blockIdx.y * width + column] = sum;
}
EXPORT(rmsnorm_backward_weight_baseline_bf16)

// grid: parts, block: 256, 8.1 KiB of shared memory
// dx or partial may be null: not wanted
extern "C" __global__ void __launch_bounds__(BLOCK)
    rmsnorm_backward_lanes_bf16(const bf16* __restrict__ dy, const bf16* __restrict__ x,
                                const bf16* __restrict__ weight, const float* __restrict__ rstd, bf16* __restrict__ dx,
                                float* __restrict__ partial, uint64_t rows, uint32_t rows_a_part, uint32_t width,
                                uint32_t accumulate, uint32_t lanes) {
  constexpr int Plane = 4 * BLOCK + 16;
  __shared__ __align__(16) float shared_sums[2 * Plane];
  const uint32_t vectors = width / 8, lane = threadIdx.x & (lanes - 1), groups = BLOCK / lanes;
  const uint32_t group = threadIdx.x / lanes;
  const uint64_t first = (uint64_t)blockIdx.x * rows_a_part, end = min(first + rows_a_part, rows);
  const bool inside = lane < vectors;
  const uint4 w = inside ? reinterpret_cast<const uint4*>(weight)[lane] : zeros();
  float sums[8] = {};
  for (uint64_t base = first; base < end; base += groups * BACKWARD_ROWS) {
    uint4 v[BACKWARD_ROWS], d[BACKWARD_ROWS], old[BACKWARD_ROWS];
    float scale[BACKWARD_ROWS], dots[BACKWARD_ROWS];
#pragma unroll
    for (int r = 0; r < BACKWARD_ROWS; r++) {
      const uint64_t row = base + r * groups + group, i = row * vectors + lane;
      const bool valid = inside && row < end;
      v[r] = valid ? reinterpret_cast<const uint4*>(x)[i] : zeros();
      d[r] = valid ? reinterpret_cast<const uint4*>(dy)[i] : zeros();
      old[r] = valid && dx && accumulate ? reinterpret_cast<const uint4*>(dx)[i] : zeros();
      scale[r] = row < end ? rstd[row] : 0.f;
    }
    if (partial) {
#pragma unroll
      for (int r = 0; r < BACKWARD_ROWS; r++) add_weight_gradient8(sums, d[r], v[r], scale[r]);
    }
    if (dx) {
#pragma unroll
      for (int r = 0; r < BACKWARD_ROWS; r++) dots[r] = dot8(d[r], w, v[r]);
      group_sums(dots, lanes);
#pragma unroll
      for (int r = 0; r < BACKWARD_ROWS; r++) {
        const uint64_t row = base + r * groups + group;
        const float projection = dots[r] * scale[r] * scale[r] / (float)width;
        if (inside && row < end) {
          reinterpret_cast<uint4*>(dx)[row * vectors + lane] = gradient8(d[r], w, v[r], old[r], scale[r], projection);
        }
      }
    }
  }
  if (!partial) return;
  // The first four sums of all threads, then the last four in the other half of the banks.
  float* mine = shared_sums + 4 * threadIdx.x;
  *reinterpret_cast<float4*>(mine) = make_float4(sums[0], sums[1], sums[2], sums[3]);
  *reinterpret_cast<float4*>(mine + Plane) = make_float4(sums[4], sums[5], sums[6], sums[7]);
  __syncthreads();
  if (threadIdx.x >= width) return;
  const float* column = shared_sums + threadIdx.x % 8 / 4 * Plane + threadIdx.x / 8 * 4 + threadIdx.x % 4;
  float sum = 0.f;
  for (uint32_t g = 0; g < groups; g++) sum += column[g * lanes * 4];
  partial[(uint64_t)blockIdx.x * width + threadIdx.x] = sum;
}
EXPORT(rmsnorm_backward_lanes_bf16)

// The rows of a part, one after another, by a block.
template <int Threads, int Vectors>
__device__ __forceinline__ void backward_rows(const bf16* __restrict__ dy, const bf16* __restrict__ x,
                                              const bf16* __restrict__ weight, const float* __restrict__ rstd,
                                              bf16* __restrict__ dx, float* __restrict__ partial, uint64_t rows,
                                              uint32_t rows_a_part, uint32_t width, uint32_t accumulate) {
  const uint32_t vectors = width / 8;
  const uint64_t first = (uint64_t)blockIdx.x * rows_a_part, end = min(first + rows_a_part, rows);
  uint4 w[Vectors], next_v[Vectors], next_d[Vectors];
  float sums[Vectors][8] = {};
  const auto fetch = [&](const bf16* from, uint64_t row, int k) {
    const uint32_t i = threadIdx.x + k * Threads;
    return i < vectors && row < end ? reinterpret_cast<const uint4*>(from)[row * vectors + i] : zeros();
  };
#pragma unroll
  for (int k = 0; k < Vectors; k++) {
    const uint32_t i = threadIdx.x + k * Threads;
    w[k] = i < vectors ? reinterpret_cast<const uint4*>(weight)[i] : zeros();
    next_v[k] = fetch(x, first, k);
    next_d[k] = fetch(dy, first, k);
  }
  for (uint64_t row = first; row < end; row++) {
    uint4 v[Vectors], d[Vectors], old[Vectors];
    const float r = rstd[row];
#pragma unroll
    for (int k = 0; k < Vectors; k++) {
      v[k] = next_v[k];
      d[k] = next_d[k];
      next_v[k] = fetch(x, row + 1, k);
      next_d[k] = fetch(dy, row + 1, k);
      old[k] = dx && accumulate ? fetch(dx, row, k) : zeros();
    }
    if (partial) {
#pragma unroll
      for (int k = 0; k < Vectors; k++) add_weight_gradient8(sums[k], d[k], v[k], r);
    }
    if (dx) {
      float dot = 0.f;
#pragma unroll
      for (int k = 0; k < Vectors; k++) dot += dot8(d[k], w[k], v[k]);
      const float projection = block_sum<Threads>(dot, row & 1) * r * r / (float)width;
#pragma unroll
      for (int k = 0; k < Vectors; k++) {
        const uint32_t i = threadIdx.x + k * Threads;
        if (i < vectors) {
          reinterpret_cast<uint4*>(dx)[row * vectors + i] = gradient8(d[k], w[k], v[k], old[k], r, projection);
        }
      }
    }
  }
  if (!partial) return;
#pragma unroll
  for (int k = 0; k < Vectors; k++) {
    const uint32_t i = threadIdx.x + k * Threads;
    if (i >= vectors) break;
    float4* to = reinterpret_cast<float4*>(partial + (uint64_t)blockIdx.x * width) + i * 2;
    to[0] = make_float4(sums[k][0], sums[k][1], sums[k][2], sums[k][3]);
    to[1] = make_float4(sums[k][4], sums[k][5], sums[k][6], sums[k][7]);
  }
}

// grid: parts, block: a vector a thread: 128, 256, 512, 1024; 256 bytes of shared memory
// dx or partial may be null: not wanted
#define BACKWARD_ROW(name, Threads, Vectors)                                                                        \
  extern "C" __global__ void __launch_bounds__(Threads)                                                             \
      name(const bf16* __restrict__ dy, const bf16* __restrict__ x, const bf16* __restrict__ weight,                \
           const float* __restrict__ rstd, bf16* __restrict__ dx, float* __restrict__ partial, uint64_t rows,       \
           uint32_t rows_a_part, uint32_t width, uint32_t accumulate) {                                             \
    backward_rows<Threads, Vectors>(dy, x, weight, rstd, dx, partial, rows, rows_a_part, width, accumulate);        \
  }                                                                                                                 \
  EXPORT(name)
BACKWARD_ROW(rmsnorm_backward_row1024_bf16, 128, 1)
BACKWARD_ROW(rmsnorm_backward_row2048_bf16, 256, 1)
BACKWARD_ROW(rmsnorm_backward_row4096_bf16, 512, 1)
BACKWARD_ROW(rmsnorm_backward_row8192_bf16, 1024, 1)

template <class Grad>
__device__ __forceinline__ void sum_columns(const float* __restrict__ partial, Grad* __restrict__ dweight,
                                            uint32_t parts, uint32_t width, uint32_t accumulate) {
  __shared__ float sums[32][32];
  const uint32_t x = threadIdx.x & 31, y = threadIdx.x / 32, column = blockIdx.x * 32 + x;
  float sum = 0.f;
  if (column < width) {
#pragma unroll 4
    for (uint32_t part = y; part < parts; part += 32) sum += partial[(uint64_t)part * width + column];
  }
  sums[y][x] = sum;
  __syncthreads();
  if (y > 0 || column >= width) return;
  for (int i = 1; i < 32; i++) sum += sums[i][x];
  from_float(dweight[column], accumulate ? to_float(dweight[column]) + sum : sum);
}

// grid: ceil(width / 32), block: 1024, 4 KiB of shared memory
extern "C" __global__ void __launch_bounds__(1024)
    rmsnorm_backward_columns_f32(const float* __restrict__ partial, float* __restrict__ dweight, uint32_t parts,
                                 uint32_t width, uint32_t accumulate) {
  sum_columns(partial, dweight, parts, width, accumulate);
}
EXPORT(rmsnorm_backward_columns_f32)

// grid: ceil(width / 32), block: 1024, 4 KiB of shared memory
extern "C" __global__ void __launch_bounds__(1024)
    rmsnorm_backward_columns_bf16(const float* __restrict__ partial, bf16* __restrict__ dweight, uint32_t parts,
                                  uint32_t width, uint32_t accumulate) {
  sum_columns(partial, dweight, parts, width, accumulate);
}
EXPORT(rmsnorm_backward_columns_bf16)
