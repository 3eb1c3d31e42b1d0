// Hopper kernels with known answers: operands laid out as the PTX manual specifies.
#include "prelude_sm90.cuh"

// grid: 1, block: 128, shared: `bytes`. y = shared memory after loading the box at (x0, x1).
extern "C" __global__ void __launch_bounds__(128) known_box(const __grid_constant__ CUtensorMap map, int x0, int x1, uint32_t bytes, uint4* __restrict__ y) {
  __shared__ __align__(8) uint64_t barrier;
  if (threadIdx.x == 0) {
    mbarrier_init(&barrier, 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_expect(&barrier, bytes);
    tma_load_2d(dynamic_shared, &map, &barrier, x0, x1);
  }
  mbarrier_wait(&barrier, 0);
  for (uint32_t i = threadIdx.x; i < bytes / 16; i += 128) y[i] = reinterpret_cast<const uint4*>(dynamic_shared)[i];
}
EXPORT(known_box)

// grid: 1, block: 128, shared: `bytes`. y = shared memory after loading the box at (x0, x1, x2).
extern "C" __global__ void __launch_bounds__(128) known_box_3d(
    const __grid_constant__ CUtensorMap map, int x0, int x1, int x2, uint32_t bytes, uint4* __restrict__ y) {
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
EXPORT(known_box_3d)

// grid: 1, block: 128, shared: `bytes`. Stores x through shared memory into the box at (x0, x1, x2), or adds it.
extern "C" __global__ void __launch_bounds__(128) known_store(
    const __grid_constant__ CUtensorMap map, int x0, int x1, int x2, uint32_t bytes, uint32_t adds, const uint4* __restrict__ x) {
  for (uint32_t i = threadIdx.x; i < bytes / 16; i += 128) reinterpret_cast<uint4*>(dynamic_shared)[i] = x[i];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (adds) tma_add_3d(&map, dynamic_shared, x0, x1, x2);
    else tma_store_3d(&map, dynamic_shared, x0, x1, x2);
    tma_store_commit();
    tma_store_wait_read<0>();
  }
}
EXPORT(known_store)

// grid: 1, block: 32, shared: 512. y = shared memory after stmatrix, with registers 4·l to 4·l + 3 in lane l.
extern "C" __global__ void __launch_bounds__(32) known_stmatrix(uint32_t* __restrict__ y) {
  const uint32_t r[4] = {4 * threadIdx.x, 4 * threadIdx.x + 1, 4 * threadIdx.x + 2, 4 * threadIdx.x + 3};
  stmatrix_x4(dynamic_shared + 16 * threadIdx.x, r);
  __syncwarp();
  for (uint32_t i = threadIdx.x; i < 128; i += 32) y[i] = reinterpret_cast<const uint32_t*>(dynamic_shared)[i];
}
EXPORT(known_stmatrix)

// grid: 1, block: 128. Two halves of the block pass a number back and forth; y = sums of it.
extern "C" __global__ void __launch_bounds__(128) known_phases(uint32_t rounds, uint32_t* __restrict__ y) {
  __shared__ __align__(8) uint64_t full, empty;
  __shared__ uint32_t number;
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 64);
    mbarrier_init(&empty, 64);
    mbarrier_fence_init();
    number = 1;
  }
  __syncthreads();
  uint32_t sum = 0;
  for (uint32_t round = 0; round < rounds; round++) {
    if (threadIdx.x < 64) {
      if (round) mbarrier_wait(&empty, (round - 1) & 1);
      if (threadIdx.x == round % 64) number = number * 3 + round;
      mbarrier_arrive(&full);
    } else {
      mbarrier_wait(&full, round & 1);
      sum += number;
      mbarrier_arrive(&empty);
    }
  }
  y[threadIdx.x] = sum;
}
EXPORT(known_phases)

// Descriptors without an address, and the operands' byte offsets at each of four steps.
struct Operands {
  uint64_t a, b;
  uint32_t a_at[4], b_at[4];
};

__device__ __forceinline__ void take_image(const uint4* image, uint32_t bytes) {
  for (uint32_t i = threadIdx.x; i < bytes / 16; i += 128) reinterpret_cast<uint4*>(dynamic_shared)[i] = image[i];
  fence_proxy_async();
  __syncthreads();
}
__device__ __forceinline__ uint64_t operand(uint64_t descriptor, uint32_t at) { return descriptor | (shared_address(dynamic_shared + at) & 0x3ffff) >> 4; }
template <int N> __device__ __forceinline__ void give_sums(const float (&sums)[N / 2], float* d) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < N / 2; i++) d[(16 * warp + lane / 4 + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = sums[i];
}

// grid: 1, block: 128, shared: `bytes`. d (64 × N, row-major) = Σ a·b over four steps of 16, from an image of shared memory.
template <int N, bool TransA, bool TransB> __device__ __forceinline__ void product(const uint4* image, uint32_t bytes, const Operands& operands, float* d) {
  take_image(image, bytes);
  float sums[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) sums[i] = 0.f;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; step++) {
    wgmma_bf16<N, TransA, TransB>(sums, operand(operands.a, operands.a_at[step]), operand(operands.b, operands.b_at[step]));
  }
  wgmma_commit();
  wgmma_wait<0>(sums);
  give_sums<N>(sums, d);
}
#define PRODUCT(name, n, a, b)                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(128) known_wgmma##n##_##name(const uint4* __restrict__ image, uint32_t bytes, Operands operands, \
                                                                            float* __restrict__ d) {                                           \
    product<n, a, b>(image, bytes, operands, d);                                                                                               \
  }                                                                                                                                            \
  EXPORT(known_wgmma##n##_##name)
PRODUCT(tn, 128, false, false)
PRODUCT(nn, 128, false, true)
PRODUCT(nt, 128, true, true)
PRODUCT(tt, 128, true, false)
PRODUCT(tn, 256, false, false)
PRODUCT(nt, 256, true, true)

// The same with a (64 × 64, row-major) in registers; d is overwritten.
template <int N, bool TransB>
__device__ __forceinline__ void product_of_registers(const uint32_t* a, const uint4* image, uint32_t bytes, const Operands& operands, float* d) {
  take_image(image, bytes);
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
  uint32_t registers[4][4];
#pragma unroll
  for (int i = 0; i < 16; i++) registers[i / 4][i % 4] = a[(row + 8 * (i % 2)) * 32 + i / 4 * 8 + i % 4 / 2 * 4 + pair];
  float sums[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; i++) sums[i] = 7.f;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; step++) {
    wgmma_bf16<N, TransB>(sums, registers[step], operand(operands.b, operands.b_at[step]), step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>(sums);
  give_sums<N>(sums, d);
}
#define PRODUCT_OF_REGISTERS(name, n, b)                                                                                                \
  extern "C" __global__ void __launch_bounds__(128) known_registers##n##_##name(const uint32_t* __restrict__ a,                          \
                                                                                const uint4* __restrict__ image, uint32_t bytes,        \
                                                                                Operands operands, float* __restrict__ d) {             \
    product_of_registers<n, b>(a, image, bytes, operands, d);                                                                           \
  }                                                                                                                                     \
  EXPORT(known_registers##n##_##name)
PRODUCT_OF_REGISTERS(n, 64, true)
PRODUCT_OF_REGISTERS(t, 64, false)
PRODUCT_OF_REGISTERS(n, 128, true)
PRODUCT_OF_REGISTERS(t, 128, false)
