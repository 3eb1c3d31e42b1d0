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

  // Whether four neighbours can be accessed at once everywhere.
  __device__ __forceinline__ bool in_fours() const {
    if (partials) return n % 4 == 0;
    const uint64_t narrow_bits = (uint64_t)bias | (uint64_t)residual;
    return n % 4 == 0 && (narrow_bits & 7) == 0 && ((uint64_t)c & (4 * sizeof(T) - 1)) == 0;
  }
  __device__ __forceinline__ void put(uint32_t row, uint32_t column, float sum) const {
    const size_t at = (size_t)row * n + column;
    if (partials) {
      partials[at] = sum;
      return;
    }
    float x = alpha * sum;
    if (bias) x += widen(bias[column]);
    if (residual) x += widen(residual[at]);
    if (accumulate) x += widen(c[at]);
    narrow(c + at, x);
  }
  __device__ __forceinline__ void put4(uint32_t row, uint32_t column, float4 sum) const {
    const size_t at = (size_t)row * n + column;
    if (partials) return store4(partials + at, sum);
    float4 x = make_float4(alpha * sum.x, alpha * sum.y, alpha * sum.z, alpha * sum.w);
    if (bias) add4(x, load4(bias + column));
    if (residual) add4(x, load4(residual + at));
    if (accumulate) add4(x, load4(c + at));
    store4(c + at, x);
  }
};

// Stores 16 rows × Columns (32 or 64) of sums that a warp holds as mma and wgmma leave them: get(j, e) is the element of
// this lane at row lane/4 + 8·(e/2), column 8·j + 2·(lane mod 4) + e mod 2. They pass through `stage` (16·Columns floats
// of this warp alone), so that global memory is accessed by whole rows. Column c of row r lies at c ^ 8·(r mod 4): the 16
// lanes of an 8-byte store meet four rows at four different 32-byte places, and 8 lanes of a 16-byte load one row.
template <int Columns, typename T, typename Get>
__device__ __forceinline__ void store_rows16(float* stage, const Epilogue<T>& epilogue, bool in_fours, uint32_t row0,
                                             uint32_t column0, Get get) {
  const uint32_t lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < Columns / 8; j++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t r = lane / 4 + 8 * half, c = (8 * j + 2 * (lane & 3)) ^ (8 * (r & 3));
      *reinterpret_cast<float2*>(stage + r * Columns + c) = make_float2(get(j, 2 * half), get(j, 2 * half + 1));
    }
  __syncwarp();
  constexpr uint32_t QUADS = Columns / 4;
#pragma unroll 4
  for (uint32_t i = lane; i < 16 * QUADS; i += 32) {
    const uint32_t r = i / QUADS, c = 4 * (i % QUADS), row = row0 + r, column = column0 + c;
    if (row >= epilogue.m || column >= epilogue.n) continue;
    const float4 x = *reinterpret_cast<const float4*>(stage + r * Columns + (c ^ (8 * (r & 3))));
    if (in_fours) {
      epilogue.put4(row, column, x);
    } else {
      const float parts[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (column + e < epilogue.n) epilogue.put(row, column + e, parts[e]);
    }
  }
  __syncwarp();
}

// The tile of a block when tiles are taken in groups of GROUP rows of tiles, column by column: what runs at one time
// shares rows of A and columns of B in L2.
struct TilePlace {
  uint32_t row, column;
};
__device__ __forceinline__ TilePlace tile_place(uint32_t tile, uint32_t tile_rows, uint32_t tile_columns) {
  constexpr uint32_t GROUP = 8;
  const uint32_t group = tile / (GROUP * tile_columns), first = group * GROUP, in_group = tile % (GROUP * tile_columns);
  const uint32_t rows = tile_rows - first < GROUP ? tile_rows - first : GROUP;
  return {first + in_group % rows, in_group / rows};
}
