// What the products of gemm.cu, gemm_bias.cu, gemm_decode.cu and gemm_sm90.cu share: the end of a tile.
#pragma once
#include "prelude.cuh"

// Four neighbours of a row in one access, and single elements.
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float* to, float x) { *to = x; }
__device__ __forceinline__ void narrow(bf16* to, float x) { *to = __float2bfloat16(x); }
__device__ __forceinline__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ __forceinline__ float4 load4(const bf16* from) {
  const uint2 bits = *reinterpret_cast<const uint2*>(from);
  return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                     __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u));
}
__device__ __forceinline__ void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
__device__ __forceinline__ void store4(bf16* to, float4 x) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack2(x.x, x.y), pack2(x.z, x.w));
}
__device__ __forceinline__ void add4(float4& x, float4 y) {
  x.x += y.x;
  x.y += y.y;
  x.z += y.z;
  x.w += y.w;
}

// C [m, n] = alpha·sum + bias [n] + residual [m, n] + C, added in this order in f32, then rounded once. With `partials`
// (one split of the depth) the bare sums go there instead, f32 [m, n].
template <typename T> struct Epilogue {
  T* c;
  const bf16* bias;
  const bf16* residual;
  float* partials;
  float alpha;
  bool accumulate;
  uint32_t m, n;

  // Whether accesses of four neighbours are aligned everywhere.
  __device__ __forceinline__ bool vectorised() const {
    if (partials) return n % 4 == 0;
    const uint64_t narrow_bits = (uint64_t)bias | (uint64_t)residual;
    return n % 4 == 0 && (narrow_bits & 7) == 0 && ((uint64_t)c & (4 * sizeof(T) - 1)) == 0;
  }
  __device__ __forceinline__ void store(uint32_t row, uint32_t column, float sum) const {
    const size_t index = (size_t)row * n + column;
    if (partials) {
      partials[index] = sum;
      return;
    }
    float x = alpha * sum;
    if (bias) x += widen(bias[column]);
    if (residual) x += widen(residual[index]);
    if (accumulate) x += widen(c[index]);
    narrow(c + index, x);
  }
  __device__ __forceinline__ void store_vector(uint32_t row, uint32_t column, float4 sum) const {
    const size_t index = (size_t)row * n + column;
    if (partials) return store4(partials + index, sum);
    float4 x = make_float4(alpha * sum.x, alpha * sum.y, alpha * sum.z, alpha * sum.w);
    if (bias) add4(x, load4(bias + column));
    if (residual) add4(x, load4(residual + index));
    if (accumulate) add4(x, load4(c + index));
    store4(c + index, x);
  }
};

// Stores 16 rows × Columns (16 to 64) of sums that a warp holds as mma and wgmma leave them: get(j, e) is the element
// of this lane at row lane/4 + 8·(e/2), column 8·j + 2·(lane mod 4) + e mod 2. They pass through `stage` (16·Columns
// floats of this warp alone), so that global memory is accessed by whole rows. Column c of row r lies at c ^ 8·(r mod
// 4), of 16 columns, whose rows are half as long as all banks, at c ^ 8·(r / 2 mod 2): the 16 lanes of an 8-byte store
// meet four rows in different banks, and 8 lanes of a 16-byte load one row or two. Unroll: accesses of a lane under way
// at a time.
template <int Columns, int Unroll, typename T, typename Get>
__device__ __forceinline__ void store_rows16(float* stage, const Epilogue<T>& epilogue, bool vectorised, uint32_t row0,
                                             uint32_t column0, Get get) {
  const auto swizzled = [](uint32_t r, uint32_t c) { return c ^ 8 * (Columns == 16 ? r >> 1 & 1 : r & 3); };
  const uint32_t lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < Columns / 8; j++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t r = lane / 4 + 8 * half, c = swizzled(r, 8 * j + 2 * (lane & 3));
      *reinterpret_cast<float2*>(stage + r * Columns + c) = make_float2(get(j, 2 * half), get(j, 2 * half + 1));
    }
  __syncwarp();
  constexpr uint32_t QUADS = Columns / 4;
#pragma unroll Unroll
  for (uint32_t i = lane; i < 16 * QUADS; i += 32) {
    const uint32_t r = i / QUADS, c = 4 * (i % QUADS), row = row0 + r, column = column0 + c;
    if (row >= epilogue.m || column >= epilogue.n) continue;
    const float4 x = *reinterpret_cast<const float4*>(stage + r * Columns + swizzled(r, c));
    if (vectorised) {
      epilogue.store_vector(row, column, x);
    } else {
      const float parts[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (column + e < epilogue.n) epilogue.store(row, column + e, parts[e]);
    }
  }
  __syncwarp();
}

// The coordinates of a tile when tiles are taken in groups of GROUP rows of tiles, column by column: what runs at one
// time shares rows of A and columns of B in L2.
struct TileCoordinates {
  uint32_t row, column;
};
__device__ __forceinline__ TileCoordinates tile_coordinates(uint32_t tile, uint32_t tile_rows, uint32_t tile_columns) {
  constexpr uint32_t GROUP = 8;
  const uint32_t group = tile / (GROUP * tile_columns), first = group * GROUP, in_group = tile % (GROUP * tile_columns);
  const uint32_t rows = tile_rows - first < GROUP ? tile_rows - first : GROUP;
  return {first + in_group % rows, in_group / rows};
}
