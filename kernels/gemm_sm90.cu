// The products of gemm.cu for Hopper: the same layouts, epilogues, groups, splits and rounding, by bulk tensor copies
// (TMA) and warpgroup products (wgmma). A and B aligned to 16 bytes with rows of whole 16 bytes.
//
//   kernel                  bytes                  FLOPs   at 4096 × 4096 × 4096, 800 TFLOP/s
//   gemm_*_wgmma*           2·(mk + nk) + |C|·mn   2·mnk   0.17 ms
//
//   kernel                  C                                                      aligned as A and B
//   gemm_*_wgmma*_bf16      sum                                                    C
//   gemm_*_wgmma*_add_bf16  alpha·sum + bias + (residual or C)                     C, residual; bias to 4 bytes
//   gemm_*_wgmma*_f32       sum, or C + sum; the sums of the splits (`partials`)   C
//   gemm_*_wgmma*_any_*     all of gemm.cu's epilogue                              -: for odd sizes and addends
//   gemm_*_wgmma*_swiglu_*  silu(A·gateᵀ)·(A·upᵀ), of sums rounded to bf16         C
//
// All but the last two take up to three products: TN and NT side by side, NN as terms of one sum.
//
// A block stays on its SM and takes tiles of 128 × (128 or 256) × 64. In the first warpgroup one thread fills a ring
// of operands and two threads store what the other two warpgroups have written; these multiply, 64 rows each, one
// product always under way. The operands of the next tile come, and the last tile's slabs leave, while products are
// under way. Operands whose k is not contiguous come as slabs of 64 columns × 64 of k and are read through transposing
// descriptors. SwiGLU: half of a tile's columns are gate's and half are up's: a thread has both sums of an output.
//
// Sums: an output's k in ascending blocks of 16, each by the tensor core; splits as in gemm.cu. f32 are added to C in
// memory, each once a launch (subnormal ones as zeros): results depend on the shape and on `splits`, never on timing.
// Banks: the 128-byte swizzle of TMA and wgmma for operands and slabs.
//
// Versions: wgmma128 wins where 256-wide tiles would leave SMs idle; wgmma256 wins elsewhere: a third less traffic from
// L2 for each product.
#include "prelude_sm90.cuh"

#include "gemm_sm90.cuh"
#include "swiglu.cuh"

constexpr int ROWS = 128, DEPTH = 64;

// Extent (of m or n) × DEPTH from (extent0, k0).
template <bool KMajor, int Extent>
__device__ __forceinline__ void load_operand(unsigned char* to, const CUtensorMap* map, uint64_t* full,
                                             uint32_t extent0, uint32_t k0) {
  if (KMajor) {
    tma_load_2d(to, map, full, k0, extent0);
  } else {
#pragma unroll
    for (int i = 0; i < Extent / 64; i++) tma_load_2d(to + i * SLAB, map, full, extent0 + 64 * i, k0);
  }
}

template <bool KMajor> __device__ __forceinline__ uint64_t operand(const unsigned char* tile, int k) {
  return wgmma_descriptor(tile + (KMajor ? 2 * k : 128 * k), KMajor ? 16 : SLAB, 1024);
}

// One thread: the operands of all tiles of the block. Where fewer columns are stored, B's first two are side by side.
template <int Columns, Layout L, int Stored>
__device__ __forceinline__ void load_operands(const Maps& a, const Maps& b, const TileScheduler<L, Stored>& scheduler) {
  typedef SharedLayout<Columns, Stored> Shared;
  Ring<Shared::STAGES> ring;
  for (uint32_t index = blockIdx.x; index < scheduler.count(); index += gridDim.x) {
    const Tile tile = scheduler.tile(index);
#pragma unroll 1
    for (uint32_t block = tile.first; block < tile.last; block++, ring.next()) {
      const Depth depth = scheduler.depth(tile, block);
      uint64_t* const full = Shared::full(ring.slot);
      mbarrier_wait(Shared::empty(ring.slot), ring.parity ^ 1);
      mbarrier_expect(full, Shared::STAGE);
      load_operand<L != NT, ROWS>(Shared::a(ring.slot), member_of(a.of, depth.term), full, tile.row, depth.k0);
      load_operand<L == TN, Stored>(Shared::b(ring.slot), member_of(b.of, depth.term), full, tile.column, depth.k0);
      if (Stored < Columns)
        load_operand<L == TN, Stored>(Shared::b(ring.slot) + Stored * 128, b.of[1], full, tile.column, depth.k0);
    }
  }
}

// A warpgroup: the products of its rows of a tile.
template <Layout L, int Columns, int Stored>
__device__ __forceinline__ void multiply_tile(float (&sums)[Columns / 2], const Tile& tile, uint32_t warpgroup,
                                              Ring<SharedLayout<Columns, Stored>::STAGES>& ring) {
  typedef SharedLayout<Columns, Stored> Shared;
  const bool elected = (threadIdx.x & 31) == 0;
#pragma unroll
  for (int i = 0; i < Columns / 2; i++) sums[i] = 0.f;
  uint32_t before = 0;
#pragma unroll 1
  for (uint32_t block = tile.first; block < tile.last; block++, ring.next()) {
    const unsigned char* tile_a = Shared::a(ring.slot) + warpgroup * SLAB;
    const unsigned char* tile_b = Shared::b(ring.slot);
    mbarrier_wait(Shared::full(ring.slot), ring.parity);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < DEPTH; i += 16)
      wgmma_bf16<Columns, L == NT, L != TN>(sums, operand<L != NT>(tile_a, i), operand<L == TN>(tile_b, i));
    wgmma_commit();
    wgmma_wait<1>();
    if (elected && block > tile.first) mbarrier_arrive(Shared::empty(before));
    before = ring.slot;
  }
  wgmma_wait<0>(sums);
  if (elected && tile.last > tile.first) mbarrier_arrive(Shared::empty(before));
}

// Tiles of Columns sums, of which the scheduler's Stored columns go into C. Out: Output or Epilogue.
template <int Columns, Layout L, int Stored, typename Out>
__device__ __forceinline__ void product(const Maps& a, const Maps& b, const Out& out,
                                        const TileScheduler<L, Stored>& scheduler) {
  typedef SharedLayout<Columns, Stored> Shared;
  if (threadIdx.x == 0) {
    for (int s = 0; s < Shared::STAGES; s++) {
      mbarrier_init(Shared::full(s), 1);
      mbarrier_init(Shared::empty(s), 8);
    }
    for (int i = 0; i < 2 * Shared::BUFFERS; i++) {
      mbarrier_init(Shared::ready(i / Shared::BUFFERS, i % Shared::BUFFERS), 1);
      mbarrier_init(Shared::written(i / Shared::BUFFERS, i % Shared::BUFFERS), 4);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_decrease<40>();
    if (threadIdx.x == 0) load_operands<Columns>(a, b, scheduler);
    if (threadIdx.x == 32 || threadIdx.x == 64) store_tiles<Columns>(out, scheduler, threadIdx.x / 32 - 1);
  } else {
    registers_increase<232>();
    const uint32_t warpgroup = threadIdx.x / 128 - 1, count = scheduler.count();
    Ring<Shared::STAGES> ring;
    uint32_t phase = 0;
    for (uint32_t index = blockIdx.x; index < count; index += gridDim.x) {
      const Tile tile = scheduler.tile(index);
      float sums[Columns / 2];
      multiply_tile<L, Columns, Stored>(sums, tile, warpgroup, ring);
      if constexpr (Stored < Columns) {
#pragma unroll
        for (int i = 0; i < Columns / 4; i++) sums[i] = swiglu_of_sums(sums[i], sums[i + Columns / 4]);
      }
      finish_tile<Columns, Stored>(out, sums, tile, warpgroup, phase);
    }
  }
}

#define GEMM_MAP(name) const __grid_constant__ CUtensorMap name
#define GEMM_MAPS(x) GEMM_MAP(x##0), GEMM_MAP(x##1), GEMM_MAP(x##2)
#define GEMM_ALL(x) {{&x##0, &x##1, &x##2}}
#define GEMM_SIZES                                                                                                     \
  uint32_t m0, uint32_t m1, uint32_t m2, uint32_t n0, uint32_t n1, uint32_t n2, uint32_t k0, uint32_t k1, uint32_t k2, \
      uint32_t splits
#define GEMM_SCHEDULE {{m0, m1, m2}, {n0, n1, n2}, {k0, k1, k2}, splits}

// The kernels of a layout. grid: at most the tiles times splits (one block an SM is of use), block: 384, shared:
// SharedLayout::BYTES. Boxes of C [splits, m, n] and of the source [1, m, n] are 64 rows of 128 bytes. TN and NT: k is
// k0; NN: m and n are m0 and n0, C is c0.
#define GEMM_STORE(LAYOUT, name, COLUMNS, dtype, T)                                                                    \
  extern "C" __global__ void __launch_bounds__(384, 1) gemm_##name##_wgmma##COLUMNS##_##dtype(                         \
      GEMM_MAPS(a), GEMM_MAPS(b), GEMM_MAPS(c), uint32_t accumulate, GEMM_SIZES) {                                     \
    const Output<T, false> output = {GEMM_ALL(c), {}, false, {}, 1.f, accumulate != 0, {}};                            \
    product<COLUMNS>(GEMM_ALL(a), GEMM_ALL(b), output, TileScheduler<LAYOUT, COLUMNS> GEMM_SCHEDULE);                  \
  }                                                                                                                    \
  EXPORT(gemm_##name##_wgmma##COLUMNS##_##dtype)                                                                       \
  SHARED_BYTES(gemm_##name##_wgmma##COLUMNS##_##dtype, SharedLayout<COLUMNS>::BYTES)
#define GEMM_ADD(LAYOUT, name, COLUMNS)                                                                                \
  extern "C" __global__ void __launch_bounds__(384, 1) gemm_##name##_wgmma##COLUMNS##_add_bf16(                        \
      GEMM_MAPS(a), GEMM_MAPS(b), GEMM_MAPS(c), GEMM_MAPS(source), uint32_t has_source,                                \
      const bf16* __restrict__ bias0, const bf16* __restrict__ bias1, const bf16* __restrict__ bias2, float alpha,     \
      GEMM_SIZES) {                                                                                                    \
    const Output<bf16, true> output = {GEMM_ALL(c), GEMM_ALL(source), has_source != 0, {bias0, bias1, bias2},          \
                                       alpha,       false,            {n0, n1, n2}};                                   \
    product<COLUMNS>(GEMM_ALL(a), GEMM_ALL(b), output, TileScheduler<LAYOUT, COLUMNS> GEMM_SCHEDULE);                  \
  }                                                                                                                    \
  EXPORT(gemm_##name##_wgmma##COLUMNS##_add_bf16)                                                                      \
  SHARED_BYTES(gemm_##name##_wgmma##COLUMNS##_add_bf16, SharedLayout<COLUMNS>::BYTES)
#define GEMM_ANY(LAYOUT, name, COLUMNS, dtype, T)                                                                      \
  extern "C" __global__ void __launch_bounds__(384, 1) gemm_##name##_wgmma##COLUMNS##_any_##dtype(                     \
      GEMM_MAP(a), GEMM_MAP(b), T* c, const bf16* __restrict__ bias, const bf16* residual,                             \
      float* __restrict__ partials, float alpha, uint32_t accumulate, uint32_t m, uint32_t n, uint32_t k,              \
      uint32_t splits) {                                                                                               \
    const Epilogue<T> epilogue = {c, bias, residual, partials, alpha, accumulate != 0, m, n};                          \
    const TileScheduler<LAYOUT, COLUMNS> scheduler = {{m}, {n}, {k}, splits};                                          \
    product<COLUMNS>({{&a, &a, &a}}, {{&b, &b, &b}}, epilogue, scheduler);                                             \
  }                                                                                                                    \
  EXPORT(gemm_##name##_wgmma##COLUMNS##_any_##dtype)                                                                   \
  SHARED_BYTES(gemm_##name##_wgmma##COLUMNS##_any_##dtype, SharedLayout<COLUMNS>::BYTES)
#define GEMM_WGMMA(LAYOUT, name, COLUMNS)                                                                              \
  GEMM_STORE(LAYOUT, name, COLUMNS, bf16, bf16)                                                                        \
  GEMM_STORE(LAYOUT, name, COLUMNS, f32, float)                                                                        \
  GEMM_ADD(LAYOUT, name, COLUMNS)                                                                                      \
  GEMM_ANY(LAYOUT, name, COLUMNS, bf16, bf16)

#define GEMM_SWIGLU(COLUMNS)                                                                                           \
  extern "C" __global__ void __launch_bounds__(384, 1) gemm_tn_wgmma##COLUMNS##_swiglu_bf16(                           \
      GEMM_MAP(a), GEMM_MAP(gate), GEMM_MAP(up), GEMM_MAP(c), uint32_t m, uint32_t n, uint32_t k) {                    \
    const Output<bf16, false> output = {{{&c, &c, &c}}, {}, false, {}, 1.f, false, {}};                                \
    const TileScheduler<TN, COLUMNS / 2> scheduler = {{m}, {n}, {k}, 1};                                               \
    product<COLUMNS>({{&a, &a, &a}}, {{&gate, &up, &up}}, output, scheduler);                                          \
  }                                                                                                                    \
  EXPORT(gemm_tn_wgmma##COLUMNS##_swiglu_bf16)                                                                         \
  SHARED_BYTES(gemm_tn_wgmma##COLUMNS##_swiglu_bf16, SharedLayout<COLUMNS, COLUMNS / 2>::BYTES)

GEMM_WGMMA(TN, tn, 128)
GEMM_WGMMA(TN, tn, 256)
GEMM_WGMMA(NN, nn, 128)
GEMM_WGMMA(NN, nn, 256)
GEMM_WGMMA(NT, nt, 128)
GEMM_WGMMA(NT, nt, 256)
GEMM_ANY(NT, nt, 128, f32, float)
GEMM_ANY(NT, nt, 256, f32, float)
GEMM_SWIGLU(128)
GEMM_SWIGLU(256)
