// planted.cu's Hopper part. The boxes of `map` are 256 floats each, one after the other: y[i] = x[255 − i] of each 256 elements.
// grid: 1, block: 256, shared: 2048 bytes, n = 512.
#include "prelude_sm90.cuh"

#define PLANT(name)                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256) name##_right(const __grid_constant__ CUtensorMap map, float* y, uint32_t n) {     \
    name<true>(map, y, n);                                                                                                            \
  }                                                                                                                                   \
  EXPORT(name##_right)                                                                                                                \
  extern "C" __global__ void __launch_bounds__(256) name##_wrong(const __grid_constant__ CUtensorMap map, float* y, uint32_t n) {     \
    name<false>(map, y, n);                                                                                                           \
  }                                                                                                                                   \
  EXPORT(name##_wrong)

struct Plan {
  bool initialise = true, fence = true, wait_full = true, wait_empty = true;
  uint32_t bytes = 1024, arrivals = 256;
};

// One buffer, which thread 0 refills when all threads have read it.
__device__ __forceinline__ void reverse(const CUtensorMap& map, float* y, uint32_t n, const Plan& plan) {
  __shared__ __align__(8) uint64_t full, empty;
  if (threadIdx.x == 0) {
    if (plan.initialise) mbarrier_init(&full, 1);
    mbarrier_init(&empty, plan.arrivals);
    if (plan.fence) mbarrier_fence_init();
  }
  __syncthreads();
  for (uint32_t tile = 0; tile < n / 256; tile++) {
    if (threadIdx.x == 0) {
      if (plan.wait_empty && tile) mbarrier_wait(&empty, (tile - 1) & 1);
      mbarrier_expect(&full, plan.bytes);
      tma_load_2d(dynamic_shared, &map, &full, 0, tile);
    }
    if (plan.wait_full) mbarrier_wait(&full, tile & 1);
    y[tile * 256 + threadIdx.x] = reinterpret_cast<const float*>(dynamic_shared)[255 - threadIdx.x];
    mbarrier_arrive(&empty);
  }
  mbarrier_wait(&full, (n / 256 - 1) & 1);
}

template <bool Right> __device__ __forceinline__ void box_not_awaited(const CUtensorMap& map, float* y, uint32_t n) {
  Plan plan;
  plan.wait_full = Right;
  reverse(map, y, n, plan);
}
PLANT(box_not_awaited)

template <bool Right> __device__ __forceinline__ void box_too_early(const CUtensorMap& map, float* y, uint32_t n) {
  Plan plan;
  plan.wait_empty = Right;
  reverse(map, y, n, plan);
}
PLANT(box_too_early)

template <bool Right> __device__ __forceinline__ void no_mbarrier(const CUtensorMap& map, float* y, uint32_t n) {
  Plan plan;
  plan.initialise = Right;
  reverse(map, y, n, plan);
}
PLANT(no_mbarrier)

template <bool Right> __device__ __forceinline__ void no_fence(const CUtensorMap& map, float* y, uint32_t n) {
  Plan plan;
  plan.fence = Right;
  reverse(map, y, n, plan);
}
PLANT(no_fence)

template <bool Right> __device__ __forceinline__ void wrong_bytes(const CUtensorMap& map, float* y, uint32_t n) {
  Plan plan;
  plan.bytes = Right ? 1024 : 2048;
  reverse(map, y, n, plan);
}
PLANT(wrong_bytes)

template <bool Right> __device__ __forceinline__ void too_many_arrivals(const CUtensorMap& map, float* y, uint32_t n) {
  Plan plan;
  plan.arrivals = Right ? 256 : 257;
  reverse(map, y, n, plan);
}
PLANT(too_many_arrivals)

// The same by stores: `map` is of y. Two warps write the buffer.
struct Stores {
  bool fence = true, barrier = true, wait = true, last_wait = true;
};
__device__ __forceinline__ void store_reversed(const CUtensorMap& map, const float* x, uint32_t n, const Stores& plan) {
  for (uint32_t tile = 0; tile < n / 256; tile++) {
    if (threadIdx.x < 64) {
      // Register m of lane l becomes word 32·m + l of the warp's 128.
      uint32_t r[4];
      for (uint32_t m = 0; m < 4; m++) r[m] = __float_as_uint(x[tile * 256 + 255 - (threadIdx.x / 32 * 128 + 32 * m + threadIdx.x % 32)]);
      stmatrix_x4(dynamic_shared + threadIdx.x * 16, r);
      if (plan.fence) fence_proxy_async();
    }
    if (plan.barrier) __syncthreads();
    else __syncwarp();
    if (threadIdx.x == 0) {
      tma_store_3d(&map, dynamic_shared, 0, tile, 0);
      tma_store_commit();
      if (plan.wait && (plan.last_wait || tile + 1 < n / 256)) tma_store_wait_read<0>();
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && plan.last_wait) tma_store_wait_read<0>();
}
template <bool Right> __device__ __forceinline__ void store_not_fenced(const CUtensorMap& map, const float* x, uint32_t n) {
  Stores plan;
  plan.fence = Right;
  store_reversed(map, x, n, plan);
}
PLANT(store_not_fenced)

template <bool Right> __device__ __forceinline__ void store_too_early(const CUtensorMap& map, const float* x, uint32_t n) {
  Stores plan;
  plan.barrier = Right;
  store_reversed(map, x, n, plan);
}
PLANT(store_too_early)

template <bool Right> __device__ __forceinline__ void store_overwritten(const CUtensorMap& map, const float* x, uint32_t n) {
  Stores plan;
  plan.wait = Right;
  store_reversed(map, x, n, plan);
}
PLANT(store_overwritten)

template <bool Right> __device__ __forceinline__ void store_left_over(const CUtensorMap& map, const float* x, uint32_t n) {
  Stores plan;
  plan.last_wait = Right;
  store_reversed(map, x, n, plan);
}
PLANT(store_left_over)

// The products: y[i] = 64, the sum of 64 registers of ones to which a product of zeros is added.
template <bool Fence, bool Wait, bool Keep, bool Publish> __device__ __forceinline__ void ones_and_zeros(float* y, uint32_t n) {
  uint32_t* words = reinterpret_cast<uint32_t*>(dynamic_shared);
  if (threadIdx.x < 32) words[threadIdx.x] = 0;
  if (Publish) fence_proxy_async();
  __syncthreads();
  float sums[64];
#pragma unroll
  for (int i = 0; i < 64; i++) sums[i] = 1.f;
  if (Fence) wgmma_fence();
  // No swizzle, offsets of 0: every piece of the operands is the same 128 bytes of zeros.
  const uint64_t zeros = (shared_address(dynamic_shared) & 0x3ffff) >> 4;
  wgmma_bf16<128, false, false>(sums, zeros, zeros);
  wgmma_commit();
  if (!Keep && threadIdx.x < 32) words[threadIdx.x] = 0x3f803f80;
  if (Wait) wgmma_wait<0>();
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < 64; i++) total += sums[i];
  wgmma_wait<0>();
  for (uint32_t i = threadIdx.x; i < n; i += 256) y[i] = total;
}

#define PLANT_PRODUCT(name, fence, wait, keep, publish)                                                                            \
  extern "C" __global__ void __launch_bounds__(256) name(const __grid_constant__ CUtensorMap, float* y, uint32_t n) {              \
    ones_and_zeros<fence, wait, keep, publish>(y, n);                                                                              \
  }                                                                                                                                \
  EXPORT(name)
PLANT_PRODUCT(product_right, true, true, true, true)
PLANT_PRODUCT(product_not_fenced_wrong, false, true, true, true)
PLANT_PRODUCT(product_not_awaited_wrong, true, false, true, true)
PLANT_PRODUCT(operand_overwritten_wrong, true, true, false, true)
PLANT_PRODUCT(operand_not_fenced_wrong, true, true, true, false)

// The same with an operand in registers, which are overwritten too early.
extern "C" __global__ void __launch_bounds__(256) operand_registers_written_wrong(const __grid_constant__ CUtensorMap, float* y, uint32_t n) {
  uint32_t* words = reinterpret_cast<uint32_t*>(dynamic_shared);
  if (threadIdx.x < 32) words[threadIdx.x] = 0;
  fence_proxy_async();
  __syncthreads();
  float sums[64];
#pragma unroll
  for (int i = 0; i < 64; i++) sums[i] = 1.f;
  uint32_t rows[4] = {};
  wgmma_fence();
  wgmma_bf16<128, false>(sums, rows, (shared_address(dynamic_shared) & 0x3ffff) >> 4);
  wgmma_commit();
  rows[0] = 0x3f803f80;
  wgmma_wait<0>(sums);
  float total = (float)rows[0];
#pragma unroll
  for (int i = 0; i < 64; i++) total += sums[i];
  for (uint32_t i = threadIdx.x; i < n; i += 256) y[i] = total;
}
EXPORT(operand_registers_written_wrong)

// Reads a word that another lane has written; in between is only a product, which orders registers, not memory.
template <bool Right> __device__ __forceinline__ void product_orders_lanes(const CUtensorMap&, float* y, uint32_t n) {
  uint32_t* words = reinterpret_cast<uint32_t*>(dynamic_shared);
  words[threadIdx.x] = 0;
  fence_proxy_async();
  __syncthreads();
  float sums[64];
#pragma unroll
  for (int i = 0; i < 64; i++) sums[i] = 0.f;
  words[256 + threadIdx.x] = 64;
  wgmma_fence();
  const uint64_t zeros = (shared_address(dynamic_shared) & 0x3ffff) >> 4;
  wgmma_bf16<128, false, false>(sums, zeros, zeros);
  wgmma_commit();
  wgmma_wait<0>(sums);
  if (Right) __syncwarp();
  const float other = (float)words[256 + (threadIdx.x ^ 1)] + sums[threadIdx.x % 2];
  for (uint32_t i = threadIdx.x; i < n; i += 256) y[i] = other;
}
PLANT(product_orders_lanes)

// The warps of a warpgroup issue products of different operands; one of them issues none.
template <bool Some> __device__ __forceinline__ void unlike(float* y, uint32_t n) {
  uint32_t* words = reinterpret_cast<uint32_t*>(dynamic_shared);
  words[threadIdx.x] = 0;
  fence_proxy_async();
  __syncthreads();
  float sums[64];
#pragma unroll
  for (int i = 0; i < 64; i++) sums[i] = 1.f;
  const bool other = threadIdx.x / 32 == 6;
  const uint64_t zeros = ((shared_address(dynamic_shared) & 0x3ffff) >> 4) + (!Some && other ? 8 : 0);
  if (!Some || !other) {
    wgmma_fence();
    wgmma_bf16<128, false, false>(sums, zeros, zeros);
    wgmma_commit();
    wgmma_wait<0>(sums);
  }
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < 64; i++) total += sums[i];
  for (uint32_t i = threadIdx.x; i < n; i += 256) y[i] = total;
}
extern "C" __global__ void __launch_bounds__(256) product_unlike_wrong(const __grid_constant__ CUtensorMap, float* y, uint32_t n) { unlike<false>(y, n); }
EXPORT(product_unlike_wrong)
extern "C" __global__ void __launch_bounds__(256) product_of_some_wrong(const __grid_constant__ CUtensorMap, float* y, uint32_t n) { unlike<true>(y, n); }
EXPORT(product_of_some_wrong)

// block: 384. Two warpgroups ask for more registers than the first has released.
template <bool Right> __device__ __forceinline__ void registers_short(float* y, uint32_t n) {
  if (threadIdx.x < 128) registers_decrease<Right ? 24 : 40>();
  else registers_increase<240>();
  for (uint32_t i = threadIdx.x; i < n; i += 384) y[i] = 64.f;
}
extern "C" __global__ void __launch_bounds__(384) registers_short_right(const __grid_constant__ CUtensorMap, float* y, uint32_t n) { registers_short<true>(y, n); }
EXPORT(registers_short_right)
extern "C" __global__ void __launch_bounds__(384) registers_short_wrong(const __grid_constant__ CUtensorMap, float* y, uint32_t n) { registers_short<false>(y, n); }
EXPORT(registers_short_wrong)
