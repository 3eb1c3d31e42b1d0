// Eight elements at a time from tensors of any alignment and length, and sums of squares in f64 in a fixed order.
#pragma once
#include "prelude.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ void from_float(bf16& to, float x) { to = __float2bfloat16(x); }
__device__ __forceinline__ void from_float(float& to, float x) { to = x; }

union F32x4 {
  uint4 bits;
  float x[4];
};

__device__ __forceinline__ bool aligned16(const void* p) { return ((uintptr_t)p & 15) == 0; }

// The access of whole, aligned groups; `Once`: data that no one reads again soon.
template <bool Once> __device__ __forceinline__ uint4 load16(const uint4* p) { return Once ? load_streaming(p) : *p; }
template <bool Once> __device__ __forceinline__ void store16(uint4* p, uint4 v) {
  if (Once) store_streaming(p, v);
  else *p = v;
}
template <bool Once> __device__ __forceinline__ void load_whole8(const bf16* p, float (&x)[8]) {
  unpack8(load16<Once>((const uint4*)p), x);
}
template <bool Once> __device__ __forceinline__ void load_whole8(const float* p, float (&x)[8]) {
  F32x4 low, high;
  low.bits = load16<Once>((const uint4*)p);
  high.bits = load16<Once>((const uint4*)p + 1);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    x[j] = low.x[j];
    x[4 + j] = high.x[j];
  }
}
template <bool Once> __device__ __forceinline__ void store_whole8(bf16* p, const float (&x)[8]) {
  store16<Once>((uint4*)p, pack8(x));
}
template <bool Once> __device__ __forceinline__ void store_whole8(float* p, const float (&x)[8]) {
  F32x4 low, high;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    low.x[j] = x[j];
    high.x[j] = x[4 + j];
  }
  store16<Once>((uint4*)p, low.bits);
  store16<Once>((uint4*)p + 1, high.bits);
}

// Elements at … at + 7, those from `len` on as 0. `whole`: the tensor is aligned to 16 bytes (then `at`, a multiple of
// 8, is too) and at + 8 ≤ len.
template <bool Once, class T> __device__ __forceinline__ void load8(const T* tensor, uint64_t at, uint64_t len,
    bool whole, float (&x)[8]) {
  if (whole) return load_whole8<Once>(tensor + at, x);
#pragma unroll
  for (int j = 0; j < 8; j++) x[j] = at + j < len ? to_float(tensor[at + j]) : 0.f;
}
// bf16 to nearest even.
template <bool Once, class T> __device__ __forceinline__ void store8(T* tensor, uint64_t at, uint64_t len, bool whole,
    const float (&x)[8]) {
  if (whole) return store_whole8<Once>(tensor + at, x);
#pragma unroll
  for (int j = 0; j < 8; j++)
    if (at + j < len) from_float(tensor[at + j], x[j]);
}

// Sum over a block of THREADS threads in f64, by halves; every thread gets it.
__device__ __forceinline__ double block_sum_f64(double x) {
  __shared__ double parts[THREADS];
  __syncthreads();
  parts[threadIdx.x] = x;
#pragma unroll
  for (unsigned half = THREADS / 2; half > 0; half >>= 1) {
    __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  __syncthreads();
  return parts[0];
}

// Σ x² of eight elements. Squares of bf16 are exact in f32, and a tree of eight rounds three times at most; f32 needs
// f64 throughout.
__device__ __forceinline__ double squares8(const float (&x)[8], bf16) {
  const float a = fmaf(x[0], x[0], x[1] * x[1]), b = fmaf(x[2], x[2], x[3] * x[3]);
  const float c = fmaf(x[4], x[4], x[5] * x[5]), d = fmaf(x[6], x[6], x[7] * x[7]);
  return (double)((a + b) + (c + d));
}
__device__ __forceinline__ double squares8(const float (&x)[8], float) {
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < 8; j++) sum += (double)x[j] * (double)x[j];
  return sum;
}

// Σ x² of the elements first … end − 1 by a block of THREADS threads; `first` a multiple of 8. Thread t adds up the
// groups of eight t, t + THREADS, …, four loads under way at once; every thread gets the sum.
template <bool Once, class T> __device__ __forceinline__ double squares_of_range(const T* tensor, uint64_t first,
    uint64_t end) {
  constexpr uint64_t STRIDE = 8 * THREADS;
  const bool aligned = aligned16(tensor);
  uint64_t at = first + 8 * threadIdx.x;
  double sum = 0.0;
  if (aligned) {
    for (; at + 3 * STRIDE + 8 <= end; at += 4 * STRIDE) {
      float x[4][8];
#pragma unroll
      for (int i = 0; i < 4; i++) load_whole8<Once>(tensor + at + i * STRIDE, x[i]);
#pragma unroll
      for (int i = 0; i < 4; i++) sum += squares8(x[i], T());
    }
  }
  for (; at < end; at += STRIDE) {
    float x[8];
    load8<Once>(tensor, at, end, aligned && at + 8 <= end, x);
    sum += squares8(x, T());
  }
  return block_sum_f64(sum);
}
