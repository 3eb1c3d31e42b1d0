// Kernels with known answers: one instruction each, with its operands laid out as the PTX manual specifies.
#include "prelude.cuh"

// grid: 1, block: 32. y = x rounded to bf16.
extern "C" __global__ void __launch_bounds__(32) known_rounding(const float* __restrict__ x, bf16* __restrict__ y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 32) y[i] = __float2bfloat16(x[i]);
}
EXPORT(known_rounding)

// grid: 1, block: 32. d (16 × 8) = a (16 × 16)·b (16 × 8), all row-major.
extern "C" __global__ void __launch_bounds__(32) known_mma(const bf16* __restrict__ a, const bf16* __restrict__ b, float* __restrict__ d) {
  const int group = threadIdx.x >> 2, in_group = threadIdx.x & 3;
  union { bf16 each[8]; uint32_t registers[4]; } ua;
  union { bf16 each[4]; uint32_t registers[2]; } ub;
  for (int i = 0; i < 8; i++) {
    const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8, column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    ua.each[i] = a[row * 16 + column];
  }
  for (int i = 0; i < 4; i++) ub.each[i] = b[(in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)) * 8 + group];
  float sums[4] = {0.f, 0.f, 0.f, 0.f};
  mma_bf16(sums, ua.registers, ub.registers);
  mma_bf16(sums, ua.registers, ub.registers);
  for (int i = 0; i < 4; i++) d[(group + (i >= 2 ? 8 : 0)) * 8 + in_group * 2 + (i & 1)] = 0.5f * sums[i];
}
EXPORT(known_mma)

// grid: 1, block: 32, shared: 1024 bytes. y = register m of lane l, of four consecutive 8 × 8 matrices.
template <bool Transposed> __device__ __forceinline__ void four_matrices(const uint4* x, uint32_t* y) {
  uint4* rows = reinterpret_cast<uint4*>(dynamic_shared);
  rows[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  uint32_t r[4];
  if (Transposed) ldmatrix_x4_trans(r, rows + threadIdx.x);
  else ldmatrix_x4(r, rows + threadIdx.x);
  for (int m = 0; m < 4; m++) y[m * 32 + threadIdx.x] = r[m];
}
extern "C" __global__ void __launch_bounds__(32) known_ldmatrix(const uint4* __restrict__ x, uint32_t* __restrict__ y) { four_matrices<false>(x, y); }
EXPORT(known_ldmatrix)
extern "C" __global__ void __launch_bounds__(32) known_ldmatrix_trans(const uint4* __restrict__ x, uint32_t* __restrict__ y) { four_matrices<true>(x, y); }
EXPORT(known_ldmatrix_trans)

// grid: 1, block: 64. Shuffles of the rank: xor 5, down 3, up 3, from 7, in widths of 32 and 8; votes.
extern "C" __global__ void __launch_bounds__(64) known_shuffles(int* __restrict__ y) {
  const int rank = threadIdx.x;
  const int all[9] = {__shfl_xor_sync(~0u, rank, 5),      __shfl_down_sync(~0u, rank, 3),    __shfl_up_sync(~0u, rank, 3),
                      __shfl_sync(~0u, rank, 7),          __shfl_down_sync(~0u, rank, 3, 8), __shfl_up_sync(~0u, rank, 3, 8),
                      __shfl_sync(~0u, rank, 7, 8),       (int)__ballot_sync(~0u, rank % 3 == 0),
                      __any_sync(~0u, rank == 40) * 2 + __all_sync(~0u, rank < 32)};
  for (int i = 0; i < 9; i++) y[i * 64 + rank] = all[i];
}
EXPORT(known_shuffles)

// grid: any, block: any up to 3 dimensions. y = each thread's block and thread index, at its global number.
extern "C" __global__ void __launch_bounds__(1024) known_places(uint4* __restrict__ y) {
  const uint32_t block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const uint32_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const uint32_t threads = blockDim.x * blockDim.y * blockDim.z;
  y[block * threads + thread] = make_uint4(blockIdx.x + 256 * threadIdx.x, blockIdx.y + 256 * threadIdx.y, blockIdx.z + 256 * threadIdx.z, 1);
}
EXPORT(known_places)

// grid: any, block: 128. Blocks and threads add up in any order; sums[1] becomes the number of blocks.
extern "C" __global__ void __launch_bounds__(128) known_atomics(uint32_t* __restrict__ sums) {
  atomicAdd(sums, threadIdx.x);
  if (threadIdx.x == 0) atomicAdd(sums + 1, 1u);
  atomicMax(sums + 2, blockIdx.x * 128 + threadIdx.x);
}
EXPORT(known_atomics)

struct Mixed { uint64_t wide; uint8_t narrow; };
// Parameters of several sizes and alignments; y = their values.
extern "C" __global__ void __launch_bounds__(32) known_parameters(uint8_t a, double b, uint16_t c, Mixed d, float* __restrict__ y, int8_t e) {
  if (threadIdx.x) return;
  const float all[6] = {(float)a, (float)b, (float)c, (float)d.wide, (float)d.narrow, (float)e};
  for (int i = 0; i < 6; i++) y[i] = all[i];
}
EXPORT(known_parameters)
