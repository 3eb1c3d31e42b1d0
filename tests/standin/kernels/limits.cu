// Kernels that need much of a multiprocessor, to test the driver's limits.
#include "prelude.cuh"

// grid: 1, block: 256, dynamic shared memory: at least 1024 bytes, 1 KiB static; y[i] = x[255 − i] + x[i]
extern "C" __global__ void __launch_bounds__(256) much_shared(const float* x, float* y, uint32_t dynamic_bytes) {
  __shared__ float own[256];
  float* last = reinterpret_cast<float*>(dynamic_shared + dynamic_bytes) - 256;
  own[threadIdx.x] = last[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = own[255 - threadIdx.x] + last[threadIdx.x];
}
EXPORT(much_shared)

// grid: 1, block: any; y[i] = x[i], 96 values a thread, all in registers at once
extern "C" __global__ void many_registers(const float* x, float* y) {
  float values[96];
#pragma unroll
  for (int i = 0; i < 96; i++) values[i] = x[i * blockDim.x + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; i++) y[i * blockDim.x + threadIdx.x] = values[i];
}
EXPORT(many_registers)
