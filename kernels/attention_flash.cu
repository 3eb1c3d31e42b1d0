// Attention, forward, with tensor cores (FlashAttention-2, arXiv 2307.08691): O = softmax(scale · Q·Kᵀ, causal inside documents) · V and
// lse [heads, tokens], the natural log-sum-exp of each row of scores. Q, O [tokens, heads·head_dim], K, V [tokens, kv_heads·head_dim], bf16,
// aligned to 16 bytes; head_dim 64 or 128; scale > 0. attention.cuh says which rows see which and how tiles lie in memory.
//
//   kernel                                bytes               FLOPs            1 × 8192 tokens, 28/4 heads of 128 (Qwen2.5-7B), 600 TFLOP/s
//   attention_forward_flash*_hd*_bf16     Q, K, V, O, lse     4·d a seen pair  0.80 ms (134 MB: 0.05 ms)
//
// A block holds 64 or 128 queries of one head (16 or 32 a warp) and streams tiles of 64 keys and values through two buffers of cp.async: a
// tile has the whole time of the one before it to arrive, and one barrier a tile suffices. Tiles that no query sees are skipped, those that
// all see are not masked. Later tiles of rows are launched first: in a long document they are the heavy ones; blocks that follow one another
// are heads of one tile, so that the heads of a group find keys and values in L2.
// 32 queries a warp halve what a FLOP reads of shared memory (1/32 byte instead of 1/16, where 128 bytes a cycle feed 2048 FLOPs); their
// Q at head_dim 128 is read again from shared memory each time, else it stays in registers.
// Rounds: P to bf16 before P·V (the sum of P takes the unrounded), O once. Sums are f32, over keys in ascending tiles: results do not depend
// on the launch, and the two versions differ in nothing.
// flash128 at head_dim 128 wants more registers than there are: its maxima and sums are in shared memory, 16 accesses a thread and tile.
// Versions: flash128 wins where the grid fills the device; flash64 where it would not (wrapper: fewer than 264 blocks of 128 queries).
#include "attention.cuh"

constexpr int KEYS = 64;

template <int HeadDim, int Tiles>
__device__ __forceinline__ void flash_forward(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                                              bf16* __restrict__ o, float* __restrict__ lse, Documents documents, int tokens, int heads,
                                              int kv_heads, float scale) {
  constexpr int Queries = 64 * Tiles, TileBytes = KEYS * HeadDim * 2, Columns = KEYS / 8;
  constexpr bool Resident = Tiles == 1, Kept = Tiles == 2 && HeadDim == 128;
  __shared__ int first_keys[Queries];
  constexpr int Stages = Queries * HeadDim * 2;
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int head = blockIdx.x, first_row = (gridDim.y - 1 - blockIdx.y) * Queries;
  const int rows = tokens - first_row < Queries ? tokens - first_row : Queries;
  const uint32_t q_stride = heads * HeadDim, kv_stride = kv_heads * HeadDim;
  const int kv_head = head / (heads / kv_heads);

  copy_tile<HeadDim, Queries, 128>(0, q, first_row * q_stride + head * HeadDim, q_stride, rows, thread);

  const int last_row = first_row + rows - 1, document = documents.of(first_row);
  const bool straddles = documents.starts[document + 1] <= (uint32_t)last_row;
  const int first_tile = documents.first_key(first_row, documents.starts[document]) / KEYS, tiles = last_row / KEYS + 1;
  if (thread < Queries) {
    const int row = first_row + thread < last_row ? first_row + thread : last_row;
    first_keys[thread] = documents.first_key(row, documents.starts[straddles ? documents.of(row, document) : document]);
  }

  const auto copy_keys = [&](int tile) {
    const int stage = Stages + (tile & 1) * 2 * TileBytes;
    const uint32_t at = tile * KEYS * kv_stride + kv_head * HeadDim;
    copy_tile<HeadDim, KEYS, 128>(stage, k, at, kv_stride, tokens - tile * KEYS, thread);
    copy_tile<HeadDim, KEYS, 128>(stage + TileBytes, v, at, kv_stride, tokens - tile * KEYS, thread);
    cp_async_commit();
  };
  copy_keys(first_tile);

  const float scale_log2 = scale * LOG2E;
  const int own = warp * Tiles * 16 * HeadDim * 2;
  uint32_t resident[HeadDim / 16][Tiles][4];
  float outputs[Tiles][HeadDim / 8][4];
  __shared__ float kept[Kept ? 4 * Tiles * 128 : 1];
  Softmax<Tiles, Kept> softmax(Kept ? kept + thread : nullptr);
  clear(outputs);
  for (int tile = first_tile; tile < tiles; tile++) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < tiles) copy_keys(tile + 1);
    const int keys = Stages + (tile & 1) * 2 * TileBytes;
    float scores[Tiles][Columns][4];
    clear(scores);
    if (Resident) {
      const int a = own + lane_offset_a<HeadDim>(lane), b = keys + lane_offset_b<HeadDim>(lane);
      if (tile == first_tile) {
#pragma unroll
        for (int i = 0; i < HeadDim / 16; i++) ldmatrix_x4(resident[i][0], dynamic_shared + (a ^ i << 5));
      }
#pragma unroll
      for (int i = 0; i < HeadDim / 16; i++) multiply_step<HeadDim>(scores, resident[i], b ^ i << 5);
    } else {
      multiply_transposed<HeadDim>(scores, own, keys, lane);
    }
    // The last of the first keys is that of the last row: all see from there on.
    if (tile * KEYS < first_keys[Queries - 1] || tile * KEYS + KEYS - 1 > first_row) {
#pragma unroll
      for (int t = 0; t < Tiles; t++) {
        const int row = (warp * Tiles + t) * 16 + (lane >> 2);
        const int first[2] = {first_keys[row], first_keys[row + 8]};
        hide_keys(scores[t], tile * KEYS + (lane & 3) * 2, first_row + row, first);
      }
    }
    softmax.update(scores, outputs, scale_log2);
    multiply_weights<HeadDim>(outputs, scores, keys + TileBytes, lane);
  }

#pragma unroll
  for (int t = 0; t < Tiles; t++) {
    const int row = (warp * Tiles + t) * 16;
    bf16* const to = o + (uint32_t)(first_row + row) * q_stride + head * HeadDim;
    const size_t lse_at = (size_t)head * tokens + first_row + row;
    store_outputs<HeadDim>(softmax, t, outputs[t], to, q_stride, lse, lse_at, rows - row, scale, own + t * 16 * HeadDim * 2, lane);
  }
}

#define FLASH_FORWARD(name, head_dim, tiles, blocks)                                                                                      \
  extern "C" __global__ void __launch_bounds__(128, blocks)                                                                               \
      name(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, bf16* __restrict__ o,                      \
           float* __restrict__ lse, const uint32_t* __restrict__ starts, int documents, int tokens, int heads, int kv_heads, float scale, \
           uint32_t window) {                                                                                                             \
    flash_forward<head_dim, tiles>(q, k, v, o, lse, Documents{starts, documents, window}, tokens, heads, kv_heads, scale);                \
  }                                                                                                                                       \
  EXPORT(name)                                                                                                                            \
  SHARED_BYTES(name, (64 * (tiles) + 4 * KEYS) * (head_dim) * 2)

// grid: heads × ceil(tokens / queries of a block), block: 128, shared: (queries of a block + 256) · head_dim · 2 bytes; lse may be null
FLASH_FORWARD(attention_forward_flash64_hd64_bf16, 64, 1, 3)
FLASH_FORWARD(attention_forward_flash64_hd128_bf16, 128, 1, 2)
FLASH_FORWARD(attention_forward_flash128_hd64_bf16, 64, 2, 2)
FLASH_FORWARD(attention_forward_flash128_hd128_bf16, 128, 2, 2)
