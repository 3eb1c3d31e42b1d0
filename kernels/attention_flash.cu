// Attention, forward, with tensor cores (FlashAttention-2, arXiv 2307.08691): O = softmax(scale · Q·Kᵀ, causal inside
// documents) · V and lse [heads, tokens], the natural log-sum-exp of each row of scores. Q, O [tokens, heads·head_dim],
// K, V [tokens, kv_heads·head_dim], bf16, aligned to 16 bytes; head_dim 64 or 128; scale > 0. attention.cuh says which
// queries see which keys and how tiles lie in memory.
//
//   kernel                                bytes            FLOPs            8192 tokens, 28/4 heads of 128, 600 TFLOP/s
//   attention_forward_flash*_hd*_bf16     Q, K, V, O, lse  4·d a seen pair  0.80 ms (134 MB: 0.05 ms)
//
// A block holds 64 or 128 queries of one head (16 or 32 a warp) and streams tiles of 64 keys and values through two
// stages of cp.async: a tile has the whole time of the one before it to arrive, and one barrier a tile suffices.
// Tiles that no query sees are skipped, those that all see are not masked. Later tiles of queries are launched first:
// in a long document they are the heavy ones; blocks that follow one another are heads of one tile, so that the heads
// of a group find K and V in L2. 32 queries a warp halve what a FLOP reads of shared memory (1/32 byte instead of
// 1/16, where 128 bytes a cycle feed 2048 FLOPs); their Q at head_dim 128 is read again from shared memory each time,
// else it stays in registers.
// flash128 at head_dim 128 wants more registers than there are: row_max and row_sum are in shared memory, 16 accesses
// a thread and tile. Its 101 KiB fit twice into the 228 KiB of an H100's multiprocessor, but once into the 164 KiB of
// an A100's, as 4 warps; the other forms fit at least twice on both.
//
// Rounds: P to bf16 before P·V (row_sum takes the unrounded), O once. Sums are f32, over keys in ascending tiles:
// results do not depend on the launch, and the two versions differ in nothing.
// Versions: flash128 wins where the grid fills the device; flash64 where it would not (wrapper: fewer blocks of 128
// queries than two a multiprocessor).
#include "attention.cuh"

constexpr int THREADS = 128, KV_TILE = 64;

// Shared memory: Q, then two stages of K and V.
template <int HeadDim, int Queries> struct SmemLayout {
  static constexpr int KV_BYTES = KV_TILE * HeadDim * 2, STAGES = Queries * HeadDim * 2;
  static constexpr int BYTES = STAGES + 4 * KV_BYTES;

  static __device__ __forceinline__ int q(int row) { return row * HeadDim * 2; }
  static __device__ __forceinline__ int k(int tile) { return STAGES + (tile & 1) * 2 * KV_BYTES; }
  static __device__ __forceinline__ int v(int tile) { return k(tile) + KV_BYTES; }
};

template <int HeadDim, int Tiles>
__device__ __forceinline__ void flash_forward(const bf16* __restrict__ q, const bf16* __restrict__ k,
                                              const bf16* __restrict__ v, bf16* __restrict__ o, float* __restrict__ lse,
                                              Documents documents, int tokens, int heads, int kv_heads, float scale) {
  constexpr int Queries = 64 * Tiles, Columns = KV_TILE / 8;
  constexpr bool QInRegisters = Tiles == 1, SoftmaxInShared = Tiles == 2 && HeadDim == 128;
  using Smem = SmemLayout<HeadDim, Queries>;
  __shared__ int first_keys[Queries];
  __shared__ float softmax_rows[SoftmaxInShared ? 4 * Tiles * THREADS : 1];
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int head = blockIdx.x, kv_head = head / (heads / kv_heads), first_row = (gridDim.y - 1 - blockIdx.y) * Queries;
  const int rows = tokens - first_row < Queries ? tokens - first_row : Queries, last_row = first_row + rows - 1;
  const uint32_t q_stride = heads * HeadDim, kv_stride = kv_heads * HeadDim;

  const uint32_t q_offset = first_row * q_stride + head * HeadDim;
  cp_async_tile<HeadDim, Queries, THREADS>(Smem::q(0), q, q_offset, q_stride, rows, thread);
  if (warp == 0) documents.find_first_keys<Queries>(first_keys, first_row, last_row);
  __syncthreads();
  const int tile_begin = first_keys[0] / KV_TILE, tile_end = last_row / KV_TILE + 1;

  const auto load_kv = [&](int tile) {
    const uint32_t offset = tile * KV_TILE * kv_stride + kv_head * HeadDim;
    const int kv_rows = tokens - tile * KV_TILE;
    cp_async_tile<HeadDim, KV_TILE, THREADS>(Smem::k(tile), k, offset, kv_stride, kv_rows, thread);
    cp_async_tile<HeadDim, KV_TILE, THREADS>(Smem::v(tile), v, offset, kv_stride, kv_rows, thread);
    cp_async_commit();
  };
  load_kv(tile_begin);

  const int warp_q = Smem::q(warp * Tiles * 16);
  uint32_t q_operand[HeadDim / 16][Tiles][4];
  float o_acc[Tiles][HeadDim / 8][4];
  Softmax<Tiles, SoftmaxInShared> softmax(SoftmaxInShared ? softmax_rows + thread : nullptr);
  zero(o_acc);
  for (int tile = tile_begin; tile < tile_end; tile++) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < tile_end) load_kv(tile + 1);
    float scores[Tiles][Columns][4];
    zero(scores);
    if (QInRegisters) {
      const int a = warp_q + ldmatrix_offset_a<HeadDim>(lane), b = Smem::k(tile) + ldmatrix_offset_b<HeadDim>(lane);
      if (tile == tile_begin) {
#pragma unroll
        for (int i = 0; i < HeadDim / 16; i++) ldmatrix_x4(q_operand[i][0], dynamic_shared + (a ^ i << 5));
      }
#pragma unroll
      for (int i = 0; i < HeadDim / 16; i++) mma_ABt_k16<HeadDim>(scores, q_operand[i], b ^ i << 5);
    } else {
      mma_ABt<HeadDim>(scores, warp_q, Smem::k(tile), lane);
    }
    // The last of the first keys is that of the last row: all see from there on.
    if (tile * KV_TILE < first_keys[Queries - 1] || tile * KV_TILE + KV_TILE - 1 > first_row) {
#pragma unroll
      for (int t = 0; t < Tiles; t++) {
        const int row = (warp * Tiles + t) * 16 + (lane >> 2);
        const int first[2] = {first_keys[row], first_keys[row + 8]};
        mask_keys(scores[t], tile * KV_TILE + (lane & 3) * 2, first_row + row, first);
      }
    }
    softmax.update(scores, o_acc, scale * LOG2E);
    mma_AB<HeadDim>(o_acc, scores, Smem::v(tile), lane);
  }

  // O passes through the warp's own rows of Q.
#pragma unroll
  for (int t = 0; t < Tiles; t++) {
    const int row = (warp * Tiles + t) * 16;
    const float upper = softmax.total(t, 0), lower = softmax.total(t, 1);
    bf16* const to = o + (uint32_t)(first_row + row) * q_stride + head * HeadDim;
    store_rows<HeadDim>(to, q_stride, rows - row, o_acc[t], 1.f / upper, 1.f / lower, Smem::q(row), lane);
    if (lse == nullptr) continue;
    softmax.store_lse(lse + (size_t)head * tokens + first_row + row, t, rows - row, scale, upper, lower, lane);
  }
}

#define FLASH_FORWARD(name, head_dim, tiles, registers)                                                                \
  extern "C" __global__ void __maxnreg__(registers)                                                                    \
      name(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, bf16* __restrict__ o,   \
           float* __restrict__ lse, const uint32_t* __restrict__ starts, int documents, int tokens, int heads,         \
           int kv_heads, float scale, uint32_t window) {                                                               \
    const Documents packed{starts, documents, window};                                                                 \
    flash_forward<head_dim, tiles>(q, k, v, o, lse, packed, tokens, heads, kv_heads, scale);                           \
  }                                                                                                                    \
  EXPORT(name)                                                                                                         \
  SHARED_BYTES(name, SmemLayout<head_dim, 64 * (tiles)>::BYTES)

// grid: heads × ceil(tokens / queries of a block), block: 128, shared: (queries of a block + 256) · head_dim · 2
// bytes; lse may be null. The bound on registers lets 4 or 2 blocks share a multiprocessor, and keeps ptxas from
// spending more where nothing is gained.
FLASH_FORWARD(attention_forward_flash64_hd64_bf16, 64, 1, 128)
FLASH_FORWARD(attention_forward_flash64_hd128_bf16, 128, 1, 204)
FLASH_FORWARD(attention_forward_flash128_hd64_bf16, 64, 2, 208)
FLASH_FORWARD(attention_forward_flash128_hd128_bf16, 128, 2, 255)
