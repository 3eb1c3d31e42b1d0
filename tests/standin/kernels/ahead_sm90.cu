// Known answers of the twins whose wrappers no kernel has needed yet: boxes of three dimensions, stores, products with an operand
// in registers.
#include "prelude_sm90.cuh"

// grid: 1, block: 128, shared: `bytes`. y = shared memory after the box at (x0, x1, x2) has come.
extern "C" __global__ void __launch_bounds__(128) ahead_box(const __grid_constant__ CUtensorMap map, int x0, int x1, int x2, uint32_t bytes, uint4* __restrict__ y) {
  __shared__ __align__(8) uint64_t barrier;
  if (threadIdx.x == 0) {
    mbarrier_init(&barrier, 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_expect(&barrier, bytes);
    tma_load_3d(dynamic_shared, &map, &barrier, x0, x1, x2);
  }
  mbarrier_wait(&barrier, 0);
  for (uint32_t i = threadIdx.x; i < bytes / 16; i += 128) y[i] = reinterpret_cast<const uint4*>(dynamic_shared)[i];
}
EXPORT(ahead_box)

// grid: 1, block: 128, shared: `bytes`. The box at (x0, x1) = shared memory = x.
extern "C" __global__ void __launch_bounds__(128) ahead_store(const __grid_constant__ CUtensorMap map, int x0, int x1, uint32_t bytes, const uint4* __restrict__ x) {
  for (uint32_t i = threadIdx.x; i < bytes / 16; i += 128) reinterpret_cast<uint4*>(dynamic_shared)[i] = x[i];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_2d(&map, dynamic_shared, x0, x1);
    tma_store_commit();
    tma_store_wait<0>();
  }
}
EXPORT(ahead_store)

// grid: 1, block: 128, shared: 4096 bytes. d (64 × 128) = a (64 × 16 by rows)·bᵀ, b (128 × 16) in rows of 32 bytes, not swizzled:
// pieces of 8 × 8 with those of k 2048 bytes apart.
extern "C" __global__ void __launch_bounds__(128) ahead_registers(const uint32_t* __restrict__ a, const uint4* __restrict__ b, float* __restrict__ d) {
  for (uint32_t i = threadIdx.x; i < 256; i += 128) reinterpret_cast<uint4*>(dynamic_shared)[i % 2 * 128 + i / 2] = b[i];
  fence_proxy_async();
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = 16 * warp + lane / 4, pair = lane % 4;
  const uint32_t registers[4] = {a[row * 8 + pair], a[(row + 8) * 8 + pair], a[row * 8 + pair + 4], a[(row + 8) * 8 + pair + 4]};
  float sums[64];
#pragma unroll
  for (int i = 0; i < 64; i++) sums[i] = 7.f;
  const uint64_t operand = (shared_address(dynamic_shared) & 0x3ffff) >> 4 | 128ull << 16 | 8ull << 32;
  wgmma_fence();
  wgmma_bf16<128, 0>(sums, registers, operand, false);
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < 64; i++) d[(row + 8 * (i / 2 % 2)) * 128 + 8 * (i / 4) + 2 * pair + i % 2] = sums[i];
}
EXPORT(ahead_registers)
