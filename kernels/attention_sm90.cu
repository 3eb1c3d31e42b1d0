// Attention, forward, for Hopper (FlashAttention-3, arXiv 2407.08608), by bulk tensor copies (TMA) and warpgroup products (wgmma): what
// attention_flash.cu computes, from the same tensors. head_dim 64 or 128; scale > 0; Q, K, V aligned to 16 bytes.
//
//   kernel                             bytes             FLOPs            1 × 8192 tokens, 28/4 heads of 128 (Qwen2.5-7B), 800 TFLOP/s
//   attention_forward_wgmma_hd*_bf16   Q, K, V, O, lse   4·d a seen pair  0.60 ms (134 MB: 0.05 ms)
//
// A block holds 128 queries of one head and streams tiles of 128 keys and values. One thread of the first warpgroup fills a ring of six
// tiles, a key tile ahead of the values: K0, K1, V0, K2, V1 … Two warpgroups of 64 queries each take them in this order.
// A warpgroup issues S = Q·Kᵀ of the next tile and O += P·V of this one together and computes the softmax of S while P·V is under way: P is
// the A operand in registers that a rounded S leaves. The two take turns in issuing, so that one has the tensor cores while the other is at
// its exponentials: 128 × 128 of these take 1024 clocks of a multiprocessor, their products 1024 (head_dim 64) or 2048.
// At head_dim 128 a thread holds S, P and O in 64 + 32 + 64 registers, and Q and the ring take all of shared memory: a block is alone on
// its multiprocessor, two warpgroups with 240 registers and one with 24.
// Which tiles are skipped or masked, and the order of blocks, are those of attention_flash.cu.
//
// Rounds: P to bf16 before P·V (the sum of P takes the unrounded), O once. Sums are f32, over keys in ascending tiles, in a tile by the
// tensor core in ascending blocks of 16: results do not depend on the launch. Banks: the 128-byte swizzle of TMA and wgmma for operands,
// store_rows for O.
// Versions: wgmma wins where its blocks reach all multiprocessors (wrapper); else those of attention_flash.cu, whose blocks are smaller.
#include "prelude_sm90.cuh"

#include "attention_sm90.cuh"

// Rows of a tile, and tiles of the ring.
constexpr int ROWS = 128, TILES = 6;

template <int HeadDim>
__device__ __forceinline__ void wgmma_forward(const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v, bf16* __restrict__ o,
                                              float* __restrict__ lse, Documents documents, int tokens, int heads, int kv_heads,
                                              float scale) {
  constexpr int TileBytes = ROWS * HeadDim * 2;
  unsigned char* const ring_tiles = dynamic_shared + TileBytes;
  uint64_t* const full = reinterpret_cast<uint64_t*>(ring_tiles + TILES * TileBytes);
  uint64_t* const empty = full + TILES;
  uint64_t* const queries_full = empty + TILES;
  const int warpgroup = threadIdx.x / WARPGROUP, head = blockIdx.x, first_row = (gridDim.y - 1 - blockIdx.y) * ROWS;
  if (threadIdx.x == 0) {
    for (int i = 0; i < TILES; i++) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], 8);
    }
    mbarrier_init(queries_full, 1);
    mbarrier_fence_init();
    mbarrier_expect(queries_full, TileBytes);
    for (int i = 0; i < 2; i++) {
      load_tile<HeadDim, 64>(dynamic_shared + i * (TileBytes / 2), q, queries_full, head * HeadDim, first_row + 64 * i);
    }
  }
  const int last_row = (tokens - first_row < ROWS ? tokens : first_row + ROWS) - 1, document = documents.of(first_row);
  const int first_tile = documents.first_key(first_row, documents.starts[document]) / ROWS, tiles = last_row / ROWS + 1;
  __syncthreads();

  Ring<TILES> ring;
  if (warpgroup == 0) {
    registers_decrease<24>();
    if (threadIdx.x == 0) {
      const int column = head / (heads / kv_heads) * HeadDim;
      const auto fill = [&](const CUtensorMap* map, int tile) {
        mbarrier_wait(&empty[ring.slot], ring.parity ^ 1);
        mbarrier_expect(&full[ring.slot], TileBytes);
        load_tile<HeadDim, ROWS>(ring_tiles + ring.slot * TileBytes, map, &full[ring.slot], column, tile * ROWS);
        ring.next();
      };
      for (int tile = first_tile; tile <= tiles; tile++) {
        if (tile < tiles) fill(k, tile);
        if (tile > first_tile) fill(v, tile - 1);
      }
    }
    return;
  }

  registers_increase<240>();
  const int half = warpgroup - 1, warp = threadIdx.x / 32 - 4, lane = threadIdx.x & 31;
  const int warp_row = first_row + warp * 16, row = warp_row + (lane >> 2);
  const unsigned char* const queries = dynamic_shared + half * (TileBytes / 2);
  const bool straddles = documents.starts[document + 1] <= (uint32_t)last_row;
  const auto first_key = [&](int row) {
    const int inside = row < last_row ? row : last_row;
    return documents.first_key(inside, documents.starts[straddles ? documents.of(inside, document) : document]);
  };
  // All rows of the warp see from the first key of its last on.
  const int first[2] = {first_key(row), first_key(row + 8)}, all_from = first_key(warp_row + 15);
  const float scale_log2 = scale * LOG2E;
  float scores[ROWS / 8][4], outputs[1][HeadDim / 8][4], factors[2];
  uint32_t weights[ROWS / 16][4];
  Softmax<1> softmax;
  clear(outputs);

  // Both start products with the next tile of the ring and return its slot.
  const auto multiply_keys = [&] {
    const uint32_t slot = ring.slot;
    mbarrier_wait(&full[slot], ring.parity);
    start_transposed<HeadDim>(scores, queries, ring_tiles + slot * TileBytes);
    ring.next();
    return slot;
  };
  const auto multiply_values = [&] {
    const uint32_t slot = ring.slot;
    mbarrier_wait(&full[slot], ring.parity);
    start_weights<HeadDim>(outputs[0], weights, ring_tiles + slot * TileBytes, true);
    ring.next();
    return slot;
  };
  const auto give_back = [&](uint32_t slot) {
    if (lane == 0) mbarrier_arrive(&empty[slot]);
  };
  const auto weigh = [&](int tile) {
    const int key = tile * ROWS;
    if (key < all_from || key + ROWS - 1 > warp_row) hide_keys(scores, key + (lane & 3) * 2, row, first);
#pragma unroll
    for (int i = 0; i < 2; i++) factors[i] = softmax.weigh(scores, 0, i, scale_log2);
  };
  const auto rescale_outputs = [&] {
#pragma unroll
    for (int i = 0; i < 2; i++) rescale(outputs[0], i, factors[i]);
  };

  mbarrier_wait(queries_full, 0);
  uint32_t keys = multiply_keys(), values = 0;
  wgmma_wait<0>(flat(scores));
  give_back(keys);
  weigh(first_tile);
  for (int tile = first_tile + 1; tile < tiles; tile++) {
    // P·V of two tiles ago, at the loop's edge: from behind the softmax of the last tile the compiler would move the wait before it.
    wgmma_wait<0>(flat(outputs[0]));
    if (tile > first_tile + 1) give_back(values);
    round_weights(weights, scores);
    // Barrier 1 + half opens that half's turn; the first half has the first one.
    if (half == 1 || tile > first_tile + 1) named_barrier(1 + half, 2 * WARPGROUP);
    keys = multiply_keys();
    rescale_outputs();
    values = multiply_values();
    if (half == 0 || tile + 1 < tiles) named_barrier_arrive(2 - half, 2 * WARPGROUP);
    wgmma_wait<1>(flat(scores));
    give_back(keys);
    weigh(tile);
  }
  wgmma_wait<0>(flat(outputs[0]));
  round_weights(weights, scores);
  rescale_outputs();
  multiply_values();
  wgmma_wait<0>(flat(outputs[0]));

  // O passes through the place of the half's own queries, which its four warps have read.
  named_barrier(3 + half, WARPGROUP);
  const uint32_t stride = heads * HeadDim;
  bf16* const to = o + (uint32_t)warp_row * stride + head * HeadDim;
  const size_t lse_at = (size_t)head * tokens + warp_row;
  store_outputs<HeadDim>(softmax, 0, outputs[0], to, stride, lse, lse_at, tokens - warp_row, scale, warp * 16 * HeadDim * 2, lane);
}

#define WGMMA_FORWARD(name, head_dim)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(384, 1)                                                                                    \
      name(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,           \
           bf16* __restrict__ o, float* __restrict__ lse, const uint32_t* __restrict__ starts, int documents, int tokens, int heads,      \
           int kv_heads, float scale, uint32_t window) {                                                                                  \
    wgmma_forward<head_dim>(&q, &k, &v, o, lse, Documents{starts, documents, window}, tokens, heads, kv_heads, scale);                    \
  }                                                                                                                                       \
  EXPORT(name)                                                                                                                            \
  SHARED_BYTES(name, (1 + TILES) * ROWS * (head_dim) * 2 + (2 * TILES + 1) * 8)

// grid: heads × ceil(tokens / 128), block: 384, shared: 1792·head_dim + 104 bytes; lse may be null. Boxes of Q are 64 rows of 64 columns,
// those of K and V 128.
WGMMA_FORWARD(attention_forward_wgmma_hd64_bf16, 64)
WGMMA_FORWARD(attention_forward_wgmma_hd128_bf16, 128)
