// What the attention kernels for Hopper share: tiles as bulk tensor copies leave them, and products of a warpgroup
// with them.
//
// A tile of rows × HeadDim is slabs of 64 columns, one after the other, each of its lines of 128 bytes, swizzled:
// what one copy brings, and what wgmma_descriptor describes. Products are of 64 rows, whose accumulators lie as those
// of mma.sync do in attention.cuh: [columns / 8][4].
#pragma once
#include "attention.cuh"

constexpr int WARPGROUP = 128;

// Starts the copies of rows `row` .. of columns `column` .. to a tile.
template <int HeadDim, int Rows>
__device__ __forceinline__ void tma_load_tile(unsigned char* tile, const CUtensorMap* map, uint64_t* full, int column,
                                              int row) {
  for (int i = 0; i < HeadDim / 64; i++) tma_load_2d(tile + i * Rows * 128, map, full, column + i * 64, row);
}

// A tile as an operand whose k are its columns, from `column` on.
template <int Rows> __device__ __forceinline__ uint64_t descriptor_k_major(const unsigned char* tile, int column) {
  return wgmma_descriptor(tile, 16, 1024) + (column / 64 * Rows * 128 + column % 64 * 2) / 16;
}
// The same whose k are its rows, from `row` on.
template <int Rows> __device__ __forceinline__ uint64_t descriptor_mn_major(const unsigned char* tile, int row) {
  return wgmma_descriptor(tile, Rows * 128, 1024) + row * 128 / 16;
}

// An accumulator as wgmma has it.
template <int Columns> __device__ __forceinline__ float (&flat(float (&acc)[Columns][4]))[4 * Columns] {
  return reinterpret_cast<float(&)[4 * Columns]>(acc);
}

// Starts acc = A · Bᵀ: A a tile of 64 rows, B one of 8·Columns.
template <int HeadDim, int Columns>
__device__ __forceinline__ void wgmma_ABt(float (&acc)[Columns][4], const unsigned char* a, const unsigned char* b) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < HeadDim; i += 16) {
    const uint64_t b_operand = descriptor_k_major<8 * Columns>(b, i);
    wgmma_bf16<8 * Columns, false, false>(flat(acc), descriptor_k_major<64>(a, i), b_operand, i > 0);
  }
  wgmma_commit();
}

// Starts acc += A · B, or acc = A · B: A (P or dS) in registers, B a tile of 16·Blocks rows. An accumulator that
// began with zeros, written while other products are under way, would make the compiler run all of them one by one.
template <int HeadDim, int Blocks>
__device__ __forceinline__ void wgmma_AB(float (&acc)[HeadDim / 8][4], const uint32_t (&a)[Blocks][4],
                                         const unsigned char* b, bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < Blocks; i++) {
    wgmma_bf16<HeadDim, true>(flat(acc), a[i], descriptor_mn_major<16 * Blocks>(b, 16 * i), accumulate || i > 0);
  }
  wgmma_commit();
}

// The A operand of an accumulator, rounded to bf16.
template <int Blocks>
__device__ __forceinline__ void to_operands(uint32_t (&operand)[Blocks][4], const float (&acc)[2 * Blocks][4]) {
#pragma unroll
  for (int i = 0; i < Blocks; i++) to_operand(operand[i], acc, i);
}
