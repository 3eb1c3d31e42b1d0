// Loads and stores of eight or four elements of tensors of any alignment and length; sums of squares in f64 in a fixed
// order.
#pragma once
#include "prelude.cuh"

constexpr int THREADS = 256;

union F32x4 {
  uint4 bits;
  float x[4];
};
union Bf16x4 {
  uint2 bits;
  bf16 x[4];
};

__device__ __forceinline__ bool aligned16(const void* p) { return ((uintptr_t)p & 15) == 0; }

// The access of whole, aligned groups; `Once`: streaming, for data that no one reads again soon. Eight f32 take two
// accesses, each of which leaves every other 16 bytes to the other: where f32 is streamed, threads take groups of four.
template <bool Once, class V> __device__ __forceinline__ V load_vector(const V* p) {
  return Once ? load_streaming(p) : *p;
}
template <bool Once> __device__ __forceinline__ void store_vector(uint4* p, uint4 v) {
  if (Once) store_streaming(p, v);
  else store_undivided(p, v);
}
template <bool Once> __device__ __forceinline__ void load_group(const bf16* p, float (&x)[8]) {
  unpack8(load_vector<Once>((const uint4*)p), x);
}
template <bool Once> __device__ __forceinline__ void load_group(const bf16* p, float (&x)[4]) {
  Bf16x4 v;
  v.bits = load_vector<Once>((const uint2*)p);
#pragma unroll
  for (int j = 0; j < 4; j++) x[j] = to_float(v.x[j]);
}
template <bool Once, int N> __device__ __forceinline__ void load_group(const float* p, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N / 4; i++) {
    F32x4 v;
    v.bits = load_vector<Once>((const uint4*)p + i);
#pragma unroll
    for (int j = 0; j < 4; j++) x[4 * i + j] = v.x[j];
  }
}
template <bool Once> __device__ __forceinline__ void store_group(bf16* p, const float (&x)[8]) {
  store_vector<Once>((uint4*)p, pack8(x));
}
template <bool Once> __device__ __forceinline__ void store_group(bf16* p, const float (&x)[4]) {
  static_assert(Once, "another kind: write it like that of eight");
  store_streaming((uint2*)p, make_uint2(pack2(x[0], x[1]), pack2(x[2], x[3])));
}
template <bool Once, int N> __device__ __forceinline__ void store_group(float* p, const float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N / 4; i++) {
    F32x4 v;
#pragma unroll
    for (int j = 0; j < 4; j++) v.x[j] = x[4 * i + j];
    store_vector<Once>((uint4*)p + i, v.bits);
  }
}

// Elements first … first + N − 1, those from `len` on as 0. `whole`: the tensor is aligned to 16 bytes (then `first`, a
// multiple of N, is to N elements) and first + N ≤ len.
template <bool Once, class T, int N> __device__ __forceinline__ void load(const T* tensor, uint64_t first, uint64_t len,
    bool whole, float (&x)[N]) {
  if (whole) return load_group<Once>(tensor + first, x);
#pragma unroll
  for (int j = 0; j < N; j++) x[j] = first + j < len ? to_float(tensor[first + j]) : 0.f;
}
template <bool Once, class T, int N> __device__ __forceinline__ void store(T* tensor, uint64_t first, uint64_t len,
    bool whole, const float (&x)[N]) {
  if (whole) return store_group<Once>(tensor + first, x);
#pragma unroll
  for (int j = 0; j < N; j++)
    if (first + j < len) from_float(tensor[first + j], x[j]);
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

// Σ x² of a group. Squares of bf16 are exact in f32, and a tree of eight rounds three times at most; f32 needs f64
// throughout.
__device__ __forceinline__ double squares(const float (&x)[8]) {
  const float a = fmaf(x[0], x[0], x[1] * x[1]), b = fmaf(x[2], x[2], x[3] * x[3]);
  const float c = fmaf(x[4], x[4], x[5] * x[5]), d = fmaf(x[6], x[6], x[7] * x[7]);
  return (double)((a + b) + (c + d));
}
__device__ __forceinline__ double squares(const float (&x)[4]) {
  double sum = 0.0;
#pragma unroll
  for (int j = 0; j < 4; j++) sum += (double)x[j] * (double)x[j];
  return sum;
}

// Σ x² of the elements first … end − 1 by a block of THREADS threads; `first` a multiple of 8. Thread t adds up the
// groups (eight bf16, four f32) t, t + THREADS, …, 64 or 128 bytes of loads under way at once; every thread gets the
// sum.
template <bool Once, class T> __device__ __forceinline__ double squares_of_range(const T* tensor, uint64_t first,
    uint64_t end) {
  constexpr int N = 16 / sizeof(T), AHEAD = 32 / N;
  constexpr uint64_t STRIDE = N * THREADS;
  const bool aligned = aligned16(tensor);
  uint64_t i = first + N * threadIdx.x;
  double sum = 0.0;
  if (aligned) {
    for (; i + (AHEAD - 1) * STRIDE + N <= end; i += AHEAD * STRIDE) {
      float x[AHEAD][N];
#pragma unroll
      for (int k = 0; k < AHEAD; k++) load_group<Once>(tensor + i + k * STRIDE, x[k]);
#pragma unroll
      for (int k = 0; k < AHEAD; k++) sum += squares(x[k]);
    }
  }
  for (; i < end; i += STRIDE) {
    float x[N];
    load<Once>(tensor, i, end, aligned && i + N <= end, x);
    sum += squares(x);
  }
  return block_sum_f64(sum);
}
