// What every kernel file includes, and nothing else: nvcc gets the device language and these wrappers of PTX; a C++
// compiler gets the CPU stand-in of the same names (tests/standin/cpp/device.h), so that the very same kernels run in
// tests without a GPU.
//
// Rules for kernel files: PTX only in prelude*.cuh, each wrapper with its twin in the stand-in; dynamic shared memory
// is `dynamic_shared`; every kernel is `extern "C" __global__` with `__launch_bounds__` or `__maxnreg__` and is named
// once in EXPORT, and in SHARED_BYTES where it uses that memory; bf16 arithmetic goes through f32.
#pragma once
#ifndef __CUDACC__
#include "device.h"
#else
#include <cuda_bf16.h>
#include <stdint.h>

#define EXPORT(kernel)
// A uint32_t that the host needs as well; build.rs reads it from the PTX.
#define CONSTANT(name, ...) extern "C" __device__ uint32_t name = __VA_ARGS__;
extern __shared__ __align__(1024) unsigned char dynamic_shared[];

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// ---- asynchronous copies, global to shared memory (sm_80)
// 16 bytes, of which the first `bytes` are read and the rest are zeros.
__device__ __forceinline__ void cp_async16(void* to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `Pending` groups of this thread are under way.
template <int Pending> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// ---- tensor cores (sm_80)
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
// d += a·b: m16n8k16, a by rows, b by columns, bf16 with f32 sums.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- approximate arithmetic: one instruction each
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sqrt_approx(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// x in radians, best within [−π, π].
__device__ __forceinline__ float sin_approx(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float cos_approx(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- memory that is read or written once
template <class V> __device__ __forceinline__ V load_streaming(const V* p) { return __ldcs(p); }
template <class V> __device__ __forceinline__ void store_streaming(V* p, V v) { __stcs(p, v); }
// One access, which the compiler does not take apart.
__device__ __forceinline__ void store_undivided(uint4* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};"
               ::"l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// A barrier of the `threads` threads that name the same `id` (1 to 15).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Counts for that barrier without waiting at it.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

// Dynamic shared memory of a block of an exported kernel, which every launch gets; stands behind its EXPORT.
#define SHARED_BYTES(kernel, ...) CONSTANT(kernel##_shared_bytes, __VA_ARGS__)

typedef __nv_bfloat16 bf16;

// Elements of a type that a kernel is a template over; bf16 to nearest even.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float& to, float x) { to = x; }
__device__ __forceinline__ void from_float(bf16& to, float x) { to = __float2bfloat16(x); }

// Eight bf16 in one 16-byte access.
union Bf16x8 {
  uint4 bits;
  __nv_bfloat162 pairs[4];
};

__device__ __forceinline__ void unpack8(uint4 bits, float (&x)[8]) {
  Bf16x8 v;
  v.bits = bits;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = __bfloat1622float2(v.pairs[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}
// To nearest even.
__device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
  Bf16x8 v;
#pragma unroll
  for (int i = 0; i < 4; i++) v.pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  return v.bits;
}
// Two floats as one register of bf16, the first in the low half: the operand layout of mma.
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  union { __nv_bfloat162 pair; uint32_t bits; } v;
  v.pair = __floats2bfloat162_rn(low, high);
  return v.bits;
}

// Sums over the warp in a fixed order; every lane gets the sum.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}
// Sum over a block of `Threads` threads (a multiple of 32), in a fixed order; every thread gets it. One barrier, before
// which the others may still read the last sum's parts: of two calls in a row, `half` is 0 in one and 1 in the other.
template <int Threads> __device__ __forceinline__ float block_sum(float x, uint32_t half = 0) {
  __shared__ float parts[2][32];
  x = warp_sum(x);
  if ((threadIdx.x & 31) == 0) parts[half][threadIdx.x >> 5] = x;
  __syncthreads();
  return warp_sum((threadIdx.x & 31) < Threads / 32 ? parts[half][threadIdx.x & 31] : 0.f);
}
// The largest in the same way, once in a kernel.
template <int Threads> __device__ __forceinline__ float block_max(float x) {
  __shared__ float parts[32];
  x = warp_max(x);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = x;
  __syncthreads();
  return warp_max((threadIdx.x & 31) < Threads / 32 ? parts[threadIdx.x & 31] : -INFINITY);
}
