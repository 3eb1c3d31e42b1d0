// Pairs of kernels, one correct and one with a planted mistake, which the stand-in must detect. All of them write
// y[i] = x[255 − i] of each 256 elements. grid: 1, block: 256, shared: 2048 bytes, n = 512.
#include "prelude.cuh"

#define PLANT(name)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(256) name##_right(const float* x, float* y, uint32_t n) { name<true>(x, y, n); }  \
  EXPORT(name##_right)                                                                                                           \
  extern "C" __global__ void __launch_bounds__(256) name##_wrong(const float* x, float* y, uint32_t n) { name<false>(x, y, n); } \
  EXPORT(name##_wrong)

__device__ __forceinline__ float* buffer() { return reinterpret_cast<float*>(dynamic_shared); }

// No barrier between the writes and the reads of a buffer.
template <bool Right> __device__ __forceinline__ void missing_barrier(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) {
    __shared__ float tile[256];
    tile[threadIdx.x] = x[i];
    if (Right) __syncthreads();
    y[i] = tile[255 - threadIdx.x];
    __syncthreads();
  }
}
PLANT(missing_barrier)

// No barrier between the reads of a buffer and the next writes.
template <bool Right> __device__ __forceinline__ void missing_second_barrier(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) {
    buffer()[threadIdx.x] = x[i];
    __syncthreads();
    y[i] = buffer()[255 - threadIdx.x];
    if (Right) __syncthreads();
  }
}
PLANT(missing_second_barrier)

__device__ __forceinline__ void copy_quarter(float* to, const float* from) {
  if (threadIdx.x < 64) cp_async16(to + 4 * threadIdx.x, from + 4 * threadIdx.x);
  cp_async_commit();
}

// Reads a group of copies without waiting for it.
template <bool Right> __device__ __forceinline__ void copy_not_awaited(const float* x, float* y, uint32_t n) {
  copy_quarter(buffer(), x);
  for (uint32_t tile = 0; tile < n / 256; tile++) {
    const bool more = (tile + 1) * 256 < n;
    if (more) copy_quarter(buffer() + (tile + 1) % 2 * 256, x + (tile + 1) * 256);
    if (Right && more) cp_async_wait<1>();
    else cp_async_wait<Right ? 0 : 2>();
    __syncthreads();
    y[tile * 256 + threadIdx.x] = buffer()[tile % 2 * 256 + 255 - threadIdx.x];
    __syncthreads();
  }
  cp_async_wait<0>();
}
PLANT(copy_not_awaited)

// A copy into a buffer that other threads still read.
template <bool Right> __device__ __forceinline__ void copy_too_early(const float* x, float* y, uint32_t n) {
  copy_quarter(buffer(), x);
  for (uint32_t tile = 0; tile < n / 256; tile++) {
    cp_async_wait<0>();
    __syncthreads();
    if (Right) {
      y[tile * 256 + threadIdx.x] = buffer()[255 - threadIdx.x];
      __syncthreads();
    }
    if ((tile + 1) * 256 < n) copy_quarter(buffer(), x + (tile + 1) * 256);
    if (!Right) y[tile * 256 + threadIdx.x] = buffer()[255 - threadIdx.x];
  }
}
PLANT(copy_too_early)

// The kernel ends with a copy that is not waited for.
template <bool Right> __device__ __forceinline__ void copy_left_over(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) y[i] = x[i - threadIdx.x + 255 - threadIdx.x];
  copy_quarter(buffer(), x);
  if (Right) cp_async_wait<0>();
}
PLANT(copy_left_over)

// Half of a warp shuffles, the other half is at another collective.
template <bool Right> __device__ __forceinline__ void divergent_shuffle(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) {
    float v = x[i - threadIdx.x + 255 - (threadIdx.x ^ 1)];
    if (Right || threadIdx.x % 32 < 16) v = __shfl_xor_sync(~0u, v, 1);
    else __syncwarp();
    y[i] = v;
  }
}
PLANT(divergent_shuffle)

// A lane that is not in the mask reads through it.
template <bool Right> __device__ __forceinline__ void wrong_mask(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) y[i] = __shfl_xor_sync(Right ? ~0u : 0xffffu, x[i - threadIdx.x + 255 - (threadIdx.x ^ 1)], 1);
}
PLANT(wrong_mask)

// A shuffle reads from a lane outside the mask.
template <bool Right> __device__ __forceinline__ void absent_lane(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) {
    const uint32_t mask = threadIdx.x % 32 < 16 ? 0xffffu : 0xffff0000u;
    y[i] = __shfl_xor_sync(mask, x[i - threadIdx.x + 255 - (threadIdx.x ^ 1)], Right ? 1 : 17);
  }
}
PLANT(absent_lane)

// Some threads wait at a different barrier.
template <bool Right> __device__ __forceinline__ void two_barriers(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) {
    buffer()[i] = x[i];
    if (Right || threadIdx.x < 128) named_barrier(1, 256);
    else __syncthreads();
    y[i] = buffer()[i - threadIdx.x + 255 - threadIdx.x];
  }
}
PLANT(two_barriers)

// Writes past the end of dynamic shared memory.
template <bool Right> __device__ __forceinline__ void past_shared(const float* x, float* y, uint32_t n) {
  float* place = buffer() + (Right ? 0 : 256);
  for (uint32_t i = threadIdx.x; i < n; i += 256) {
    place[i] = x[i];
    __syncthreads();
    y[i] = place[i - threadIdx.x + 255 - threadIdx.x];
  }
}
PLANT(past_shared)

// An index past the end of a static shared array.
template <bool Right> __device__ __forceinline__ void past_array(const float* x, float* y, uint32_t n) {
  __shared__ float tile[256];
  for (uint32_t i = threadIdx.x; i < n; i += 256) {
    tile[threadIdx.x] = x[i];
    __syncthreads();
    y[i] = tile[(Right ? 255 : 256) - threadIdx.x];
    __syncthreads();
  }
}
PLANT(past_array)

// Sixteen bytes read where only four are aligned.
template <bool Right> __device__ __forceinline__ void misaligned_vector(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) {
    const uint32_t from = i - threadIdx.x + 255 - threadIdx.x;
    const float4 four = *reinterpret_cast<const float4*>(x + (Right ? from / 4 * 4 : from < 4 ? 0 : from - 3));
    const float each[4] = {four.x, four.y, four.z, four.w};
    y[i] = each[Right ? from % 4 : from < 4 ? from : 3];
  }
}
PLANT(misaligned_vector)

// cp.async and ldmatrix of addresses that are aligned to eight bytes only.
template <bool Right> __device__ __forceinline__ void misaligned_copy(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) y[i] = x[i - threadIdx.x + 255 - threadIdx.x];
  if (threadIdx.x == 0) cp_async16(buffer() + (Right ? 4 : 2), x);
  cp_async_commit();
  cp_async_wait<0>();
}
PLANT(misaligned_copy)

template <bool Right> __device__ __forceinline__ void misaligned_matrix(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) y[i] = x[i - threadIdx.x + 255 - threadIdx.x];
  uint32_t r[2];
  ldmatrix_x2(r, dynamic_shared + (threadIdx.x % 16) * (Right ? 16 : 24));
}
PLANT(misaligned_matrix)

// A product of a warp one lane of which has ended.
template <bool Right> __device__ __forceinline__ void lost_lane(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) y[i] = x[i - threadIdx.x + 255 - threadIdx.x];
  if (!Right && threadIdx.x == 9) return;
  const uint32_t a[4] = {0, 0, 0, 0}, b[2] = {0, 0};
  float d[4] = {0.f, 0.f, 0.f, 0.f};
  mma_bf16(d, a, b);
}
PLANT(lost_lane)

// Reads past a device buffer, which ends at a guard page.
template <bool Right> __device__ __forceinline__ void past_buffer(const float* x, float* y, uint32_t n) {
  for (uint32_t i = threadIdx.x; i < n; i += 256) y[i] = x[i - threadIdx.x + 255 - threadIdx.x + (Right ? 0 : n)];
}
PLANT(past_buffer)

// ---- grid: 2; a word of zero follows y

// Block 1 first, then block 0, which adds to its results: thread 0 waits for the block's turn, then passes it on.
template <bool Wait, bool Fence> __device__ __forceinline__ void in_turn(const float* x, float* y, uint32_t n) {
  uint32_t* turn = reinterpret_cast<uint32_t*>(y + n);
  if (threadIdx.x == 0) {
    while (Wait && atomicAdd(turn, 0u) != 1 - blockIdx.x) __nanosleep(20);
    if (Fence) __threadfence();
  }
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < n; i += 256) {
    const float half = 0.5f * x[i - threadIdx.x + 255 - threadIdx.x];
    y[i] = blockIdx.x == 1 ? half : y[i] + half;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (Fence) __threadfence();
    atomicAdd(turn, 1u);
  }
}
template <bool Right> __device__ __forceinline__ void blocks_not_awaited(const float* x, float* y, uint32_t n) { in_turn<Right, true>(x, y, n); }
PLANT(blocks_not_awaited)
template <bool Right> __device__ __forceinline__ void blocks_not_fenced(const float* x, float* y, uint32_t n) { in_turn<true, Right>(x, y, n); }
PLANT(blocks_not_fenced)

// A block claims the next part by a read and a write; another may claim the same in between.
template <bool Right> __device__ __forceinline__ void blocks_overlap(const float* x, float* y, uint32_t n) {
  __shared__ uint32_t part;
  uint32_t* next = reinterpret_cast<uint32_t*>(y + n);
  if (threadIdx.x == 0) part = Right ? atomicAdd(next, 1u) : *next;
  __syncthreads();
  if (!Right && threadIdx.x == 0) *next = part + 1;
  y[part * 256 + threadIdx.x] = x[part * 256 + 255 - threadIdx.x];
}
PLANT(blocks_overlap)

// ---- y of more than 2^32 elements, which end with the results

// The offset of the last row overflows 32 bits.
template <bool Right> __device__ __forceinline__ void offset_overflows(const float* x, float* y, uint32_t n) {
  const uint32_t row = (n << 11) + 1, width = 8 * n;
  float* to = Right ? y + (uint64_t)row * width : y + row * width;
  for (uint32_t i = threadIdx.x; i < n; i += 256) to[i] = x[i - threadIdx.x + 255 - threadIdx.x];
}
PLANT(offset_overflows)
