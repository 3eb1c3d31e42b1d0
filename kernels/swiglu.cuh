// What the kernels of swiglu.cu share with the products that end in SwiGLU (gemm.cu, gemm_sm90.cu).
#pragma once
#include "prelude.cuh"

// silu(gate)·up.
__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }

// The same of two sums, rounded first as if they had been stored.
__device__ __forceinline__ float swiglu_of_sums(float gate, float up) {
  return swiglu(__bfloat162float(__float2bfloat16(gate)), __bfloat162float(__float2bfloat16(up)));
}
