// The products of gemm.cu for Hopper: the same layouts, epilogue, splits and rounding, by bulk tensor copies (TMA) and
// warpgroup products (wgmma). A and B aligned to 16 bytes with rows of whole 16 bytes; the other operands may lie anywhere.
//
//   kernel                  bytes                  FLOPs   at 4096 × 4096 × 4096, 800 TFLOP/s
//   gemm_*_wgmma128, 256    2·(mk + nk) + |C|·mn   2·mnk   0.17 ms
//
// A block stays on its SM and takes tiles of 128 × (128 or 256) × 64: grid-stride over tile and split. One thread of the
// first warpgroup fills a ring of tiles; two warpgroups multiply, 64 rows each, one product always under way, and give a
// tile back when its product is done. The ring runs on while sums are stored, so the next tile's operands are there.
// Operands whose k is not contiguous come as slabs of 64 columns × 64 of k and are read through transposing descriptors.
//
// Sums: an output's k in ascending blocks of 16, each by the tensor core; splits as in gemm.cu. Banks: the 128-byte
// swizzle of TMA and wgmma for operands, store_rows16 for sums.
//
// Versions: wgmma128 wins where 256-wide tiles would leave SMs idle; wgmma256 wins elsewhere: a third less traffic from
// L2 for each product.
#include "prelude_sm90.cuh"

#include "gemm.cuh"

enum Layout { TN, NN, NT };

constexpr int ROWS = 128, DEPTH = 64, WARPGROUP = 128, SLAB = 64 * DEPTH * 2, STAGE_FLOATS = 16 * 64;

// A piece of work: a tile's k-blocks first … last − 1.
struct Work {
  uint32_t row0, column0, first, last, split;
};
template <int Columns>
__device__ __forceinline__ Work work_at(uint32_t item, uint32_t m, uint32_t n, uint32_t k, uint32_t splits) {
  const uint32_t tile_rows = (m + ROWS - 1) / ROWS, tile_columns = (n + Columns - 1) / Columns;
  const uint32_t tiles = tile_rows * tile_columns, split = item / tiles, blocks = (k + DEPTH - 1) / DEPTH;
  const TilePlace place = tile_place(item % tiles, tile_rows, tile_columns);
  return {place.row * ROWS, place.column * Columns, (uint32_t)((uint64_t)blocks * split / splits),
          (uint32_t)((uint64_t)blocks * (split + 1) / splits), split};
}

// Extent (of m or n) × DEPTH from (extent0, k0).
template <bool KMajor, int Extent>
__device__ __forceinline__ void fill(unsigned char* tile, const CUtensorMap* map, uint64_t* full, uint32_t extent0,
                                     uint32_t k0) {
  if (KMajor) {
    tma_load_2d(tile, map, full, k0, extent0);
  } else {
#pragma unroll
    for (int i = 0; i < Extent / 64; i++) tma_load_2d(tile + i * SLAB, map, full, extent0 + 64 * i, k0);
  }
}

template <bool KMajor> __device__ __forceinline__ uint64_t operand(const unsigned char* tile, int k) {
  return wgmma_descriptor(tile + (KMajor ? 2 * k : 128 * k), KMajor ? 16 : SLAB, 1024);
}

template <Layout L, int Columns, int Stages, typename T>
__device__ __forceinline__ void wgmma(const CUtensorMap* map_a, const CUtensorMap* map_b, Epilogue<T> epilogue,
                                      uint32_t k, uint32_t splits, uint32_t items) {
  constexpr int BYTES_A = ROWS * DEPTH * 2, BYTES_B = Columns * DEPTH * 2, STAGE = BYTES_A + BYTES_B;
  float* staging = reinterpret_cast<float*>(dynamic_shared + Stages * STAGE);
  uint64_t* full = reinterpret_cast<uint64_t*>(staging + 8 * STAGE_FLOATS);
  uint64_t* empty = full + Stages;
  const uint32_t m = epilogue.m, n = epilogue.n, warpgroup = threadIdx.x / WARPGROUP;
  if (threadIdx.x == 0) {
    for (int s = 0; s < Stages; s++) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], 8);
    }
    mbarrier_fence_init();
  }
  __syncthreads();

  Ring<Stages> ring;
  if (warpgroup == 0) {
    registers_decrease<40>();
    if (threadIdx.x == 0) {
      for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Work work = work_at<Columns>(item, m, n, k, splits);
        for (uint32_t block = work.first; block < work.last; block++, ring.next()) {
          unsigned char* stage = dynamic_shared + ring.slot * STAGE;
          mbarrier_wait(&empty[ring.slot], ring.parity ^ 1);
          mbarrier_expect(&full[ring.slot], STAGE);
          fill<L != NT, ROWS>(stage, map_a, &full[ring.slot], work.row0, block * DEPTH);
          fill<L == TN, Columns>(stage + BYTES_A, map_b, &full[ring.slot], work.column0, block * DEPTH);
        }
      }
    }
  } else {
    registers_increase<232>();
    const uint32_t warp = threadIdx.x / 32 - 4, lane = threadIdx.x & 31;
    const bool in_fours = epilogue.in_fours();
    float* const partials = epilogue.partials;
    for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) {
      const Work work = work_at<Columns>(item, m, n, k, splits);
      float sums[Columns / 2];
#pragma unroll
      for (int i = 0; i < Columns / 2; i++) sums[i] = 0.f;
      uint32_t before = 0;
      for (uint32_t block = work.first; block < work.last; block++, ring.next()) {
        const unsigned char* tile_a = dynamic_shared + ring.slot * STAGE + (warpgroup - 1) * SLAB;
        const unsigned char* tile_b = dynamic_shared + ring.slot * STAGE + BYTES_A;
        mbarrier_wait(&full[ring.slot], ring.parity);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < DEPTH; i += 16)
          wgmma_bf16<Columns, L == NT, L != TN>(sums, operand<L != NT>(tile_a, i), operand<L == TN>(tile_b, i));
        wgmma_commit();
        wgmma_wait<1>();
        if (lane == 0 && block > work.first) mbarrier_arrive(&empty[before]);
        before = ring.slot;
      }
      wgmma_wait<0>();
      if (lane == 0 && work.last > work.first) mbarrier_arrive(&empty[before]);
      if (partials) epilogue.partials = partials + (size_t)work.split * m * n;
#pragma unroll
      for (int c = 0; c < Columns / 64; c++)
        store_rows16<64>(staging + warp * STAGE_FLOATS, epilogue, in_fours, work.row0 + 16 * warp, work.column0 + 64 * c,
                         [&](int j, int e) { return sums[4 * (8 * c + j) + e]; });
    }
  }
}

// grid: any (at most one block an SM is of use), block: 384,
// shared: Stages·(16384 + Columns·128) + 32768 + 16·Stages bytes: 229440 for 256 columns, 229472 for 128
#define GEMM_WGMMA(LAYOUT, name, dtype, T, COLUMNS, STAGES)                                                            \
  extern "C" __global__ void __launch_bounds__(384, 1) gemm_##name##_wgmma##COLUMNS##_##dtype(                         \
      const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, T* c,                              \
      const bf16* __restrict__ bias, const bf16* residual, float* __restrict__ partials, float alpha,                  \
      uint32_t accumulate, uint32_t m, uint32_t n, uint32_t k, uint32_t splits, uint32_t items) {                      \
    wgmma<LAYOUT, COLUMNS, STAGES, T>(&a, &b, {c, bias, residual, partials, alpha, accumulate != 0, m, n}, k, splits,  \
                                      items);                                                                          \
  }                                                                                                                    \
  EXPORT(gemm_##name##_wgmma##COLUMNS##_##dtype)                                                                       \
  SHARED_BYTES(gemm_##name##_wgmma##COLUMNS##_##dtype,                                                                 \
               (STAGES) * (ROWS + (COLUMNS)) * DEPTH * 2 + 8 * STAGE_FLOATS * 4 + 2 * (STAGES) * 8)

GEMM_WGMMA(TN, tn, bf16, bf16, 128, 6)
GEMM_WGMMA(TN, tn, bf16, bf16, 256, 4)
GEMM_WGMMA(NN, nn, bf16, bf16, 128, 6)
GEMM_WGMMA(NN, nn, bf16, bf16, 256, 4)
GEMM_WGMMA(NT, nt, bf16, bf16, 128, 6)
GEMM_WGMMA(NT, nt, bf16, bf16, 256, 4)
GEMM_WGMMA(NT, nt, f32, float, 128, 6)
GEMM_WGMMA(NT, nt, f32, float, 256, 4)
