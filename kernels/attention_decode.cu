// Attention for a key-value cache with tensor cores: one query a span of rows of K and V, whose last row is its own
// position. Q, O [spans, heads·head_dim], all aligned to 16 bytes; spans [spans, 2] (start, rows); head_dim 64 or
// 128; scale > 0.
//
//   kernel                             bytes                                    FLOPs
//   attention_decode_flash_hd*_bf16    K, V once a group of 16 heads; partials  4·d a key and head
// 64 spans of 4096, 28/4 heads of 128, 3.0 TB/s: 0.18 ms.
//
// Flash-decoding: a block takes a chunk of 256 keys of one span and one key-value head (chunks are what fills the
// device when few spans are long), and all query heads of that head at once, which share every key: they are the 16
// rows of the mma (groups beyond 16 take more blocks). Each warp streams its own tiles of 16 keys through two stages
// of cp.async and waits for nobody; three blocks an SM keep 96 KiB in flight. At the end the four warps' sums are
// added in their order, and the chunks' by attention_decode_combine_bf16 in theirs. The chunk is a constant: an
// answer does not depend on the other spans of the step.
//
// Rounds: P to bf16 before P·V, O once. Sums are f32: of a warp over its tiles in ascending order, then over warps,
// then over chunks. Banks: as attention.cuh.
// Versions: this, wherever its alignment and head_dim are met; else the baseline of attention.cu.
#include "attention.cuh"

constexpr int WARPS = 4, KV_TILE = 16;

// Shared memory: the 16 query heads, then for each warp two stages of K and V. Behind the loop the warps' f32 outputs
// take the same place.
template <int HeadDim> struct SmemLayout {
  static constexpr int TILE_BYTES = KV_TILE * HeadDim * 2, BYTES = (1 + 4 * WARPS) * TILE_BYTES;

  static __device__ __forceinline__ int k(int warp, int i) { return (1 + warp * 4 + (i & 1) * 2) * TILE_BYTES; }
  static __device__ __forceinline__ int v(int warp, int i) { return k(warp, i) + TILE_BYTES; }
  // Column d of row r lies at d ^ 8·(r mod 4): the 16 lanes of an 8-byte store meet four rows in all banks.
  static __device__ __forceinline__ float* o(int warp, int r, int d) {
    return reinterpret_cast<float*>(dynamic_shared) + (warp * 16 + r) * HeadDim + (d ^ 8 * (r & 3));
  }
};

// row_max (times scale · log2 e) and row_sum of each warp.
struct WarpSoftmax {
  float row_max[WARPS][16], row_sum[WARPS][16];
};

// A warp's share of the chunk's keys.
template <int HeadDim>
__device__ __forceinline__ void attend_chunk(const bf16* keys, const bf16* values, uint32_t stride, int count,
                                             float scale, Softmax<1>& softmax, float (&o_acc)[1][HeadDim / 8][4]) {
  using Smem = SmemLayout<HeadDim>;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, own = count - warp * KV_TILE;
  const int tiles = own > 0 ? (own + WARPS * KV_TILE - 1) / (WARPS * KV_TILE) : 0;
  const auto load_kv = [&](int i) {
    const int first = (i * WARPS + warp) * KV_TILE;
    if (i < tiles) {
      cp_async_tile<HeadDim, KV_TILE, 32>(Smem::k(warp, i), keys, first * stride, stride, count - first, lane);
      cp_async_tile<HeadDim, KV_TILE, 32>(Smem::v(warp, i), values, first * stride, stride, count - first, lane);
    }
    cp_async_commit();
  };
  load_kv(0);
  load_kv(1);
  // The queries, which all warps have copied, came before the second tile.
  cp_async_wait<1>();
  __syncthreads();
  uint32_t q_operand[HeadDim / 16][1][4];
  const int a = ldmatrix_offset_a<HeadDim>(lane), b = ldmatrix_offset_b<HeadDim>(lane);
#pragma unroll
  for (int i = 0; i < HeadDim / 16; i++) ldmatrix_x4(q_operand[i][0], dynamic_shared + (a ^ i << 5));

  for (int i = 0; i < tiles; i++) {
    cp_async_wait<1>();
    __syncwarp();
    const int first = (i * WARPS + warp) * KV_TILE;
    float scores[1][KV_TILE / 8][4];
    zero(scores);
#pragma unroll
    for (int j = 0; j < HeadDim / 16; j++) mma_ABt_k16<HeadDim>(scores, q_operand[j], (Smem::k(warp, i) + b) ^ j << 5);
    if (first + KV_TILE > count) {
#pragma unroll
      for (int n = 0; n < KV_TILE / 8; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (first + n * 8 + (lane & 3) * 2 + (j & 1) >= count) scores[0][n][j] = -INFINITY;
        }
      }
    }
    softmax.update(scores, o_acc, scale * LOG2E);
    mma_AB<HeadDim>(o_acc, scores, Smem::v(warp, i), lane);
    __syncwarp();
    load_kv(i + 2);
  }
}

// Puts the warp's softmax and outputs where combine_warps finds them.
template <int HeadDim>
__device__ __forceinline__ void share(const Softmax<1>& softmax, const float (&o_acc)[HeadDim / 8][4], float scale,
                                      WarpSoftmax& rows) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = (lane >> 2) + half * 8;
    const float total = softmax.total(0, half);
    if ((lane & 3) == 0) {
      rows.row_max[warp][r] = softmax.row_max(0, half) * (scale * LOG2E);
      rows.row_sum[warp][r] = total;
    }
#pragma unroll
    for (int n = 0; n < HeadDim / 8; n++) {
      float2* const to = reinterpret_cast<float2*>(SmemLayout<HeadDim>::o(warp, r, n * 8 + (lane & 3) * 2));
      *to = make_float2(o_acc[n][2 * half], o_acc[n][2 * half + 1]);
    }
  }
}

// Adds the warps' outputs of `rows` heads, of which `row` is the first among those of all spans.
template <int HeadDim>
__device__ __forceinline__ void combine_warps(const WarpSoftmax& warps, bf16* o, float* partial, float2* stats,
                                              size_t row, int rows) {
  for (int i = threadIdx.x; i < rows * HeadDim; i += 32 * WARPS) {
    const int r = i / HeadDim, d = i % HeadDim;
    const float(&row_max)[WARPS][16] = warps.row_max;
    const float top = fmaxf(fmaxf(row_max[0][r], row_max[1][r]), fmaxf(row_max[2][r], row_max[3][r]));
    float sum = 0.f, total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float weight = row_max[w][r] == -INFINITY ? 0.f : exp2_approx(row_max[w][r] - top);
      sum = fmaf(weight, *SmemLayout<HeadDim>::o(w, r, d), sum);
      total = fmaf(weight, warps.row_sum[w][r], total);
    }
    if (gridDim.z == 1) {
      o[row * HeadDim + i] = __float2bfloat16(sum * (total > 0.f ? 1.f / total : 0.f));
    } else {
      const size_t part = (row + r) * gridDim.z + blockIdx.z;
      partial[part * HeadDim + d] = sum;
      if (d == 0) stats[part] = make_float2(top, total);
    }
  }
}

template <int HeadDim>
__device__ __forceinline__ void flash_decode(const bf16* __restrict__ q, const bf16* __restrict__ k,
                                             const bf16* __restrict__ v, bf16* __restrict__ o,
                                             float* __restrict__ partial, float2* __restrict__ stats,
                                             const uint32_t* __restrict__ spans, int heads, int kv_heads, float scale,
                                             uint32_t window) {
  __shared__ WarpSoftmax warps;
  const Chunk chunk(spans + 2 * blockIdx.x, window, blockIdx.z);
  if (chunk.count <= 0 && gridDim.z > 1) return;
  const int group = heads / kv_heads, parts = (group + 15) / 16, kv_head = blockIdx.y / parts;
  const int first_head = blockIdx.y % parts * 16, rows = group - first_head < 16 ? group - first_head : 16;
  const size_t row = (size_t)blockIdx.x * heads + kv_head * group + first_head;
  const uint32_t stride = kv_heads * HeadDim;
  const size_t kv_offset = chunk.first * stride + kv_head * HeadDim;

  cp_async_tile<HeadDim, 16, 32 * WARPS>(0, q + row * HeadDim, 0, HeadDim, rows, threadIdx.x);
  float o_acc[1][HeadDim / 8][4];
  Softmax<1> softmax;
  zero(o_acc);
  attend_chunk<HeadDim>(k + kv_offset, v + kv_offset, stride, chunk.count, scale, softmax, o_acc);
  cp_async_wait<0>();
  __syncthreads();
  share<HeadDim>(softmax, o_acc[0], scale, warps);
  __syncthreads();
  combine_warps<HeadDim>(warps, o, partial, stats, row, rows);
}

#define FLASH_DECODE(name, head_dim)                                                                                   \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, 3)                                                          \
      name(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, bf16* __restrict__ o,   \
           float* __restrict__ partial, float2* __restrict__ stats, const uint32_t* __restrict__ spans, int heads,     \
           int kv_heads, float scale, uint32_t window) {                                                               \
    flash_decode<head_dim>(q, k, v, o, partial, stats, spans, heads, kv_heads, scale, window);                         \
  }                                                                                                                    \
  EXPORT(name)                                                                                                         \
  SHARED_BYTES(name, SmemLayout<head_dim>::BYTES)

// One chunk in all: O itself; more: the undivided sums [spans, heads, chunks, head_dim] and (row_max, row_sum)
// [spans, heads, chunks]. grid: spans × kv_heads · ceil(group / 16) × chunks, block: 128, shared: 272 · 2 · head_dim
// bytes
FLASH_DECODE(attention_decode_flash_hd64_bf16, 64)
FLASH_DECODE(attention_decode_flash_hd128_bf16, 128)
