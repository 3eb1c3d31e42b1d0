// Attention for a key-value cache with tensor cores: one query a span of rows of K and V, whose last row is its own position. Q, O
// [spans, heads·head_dim], all aligned to 16 bytes; spans [spans, 2] (start, rows); head_dim 64 or 128; scale > 0.
//
//   kernel                             bytes                                    FLOPs              64 spans of 4096, 28/4 heads of 128, 3.0 TB/s
//   attention_decode_flash_hd*_bf16    K, V once a group of 16 heads; partials  4·d a key and head  0.18 ms
//
// A block takes a chunk of 256 keys of one span and one key-value head (flash-decoding: chunks are what fills the device when few spans are
// long), and all query heads of that head at once, which share every key: they are the 16 rows of the mma (groups beyond 16 take more
// blocks). Each warp streams its own tiles of 16 keys through two buffers of cp.async and waits for nobody; three blocks an SM keep 96 KiB
// in flight. At the end the four warps' sums are added in their order, and the chunks' by attention_decode_combine_bf16 in theirs. The chunk
// is a constant: an answer does not depend on the other spans of the step.
// Rounds: P to bf16 before P·V, O once. Banks: as attention.cuh.
#include "attention.cuh"

template <int HeadDim>
__device__ __forceinline__ void flash_decode(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, bf16* __restrict__ o,
                                             float* __restrict__ partial, float2* __restrict__ stats, const uint32_t* __restrict__ spans, int heads,
                                             int kv_heads, float scale, uint32_t window) {
  constexpr int Warps = 4, Keys = 16, TileBytes = Keys * HeadDim * 2, Stages = TileBytes;
  __shared__ float tops[Warps][16], totals[Warps][16];
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const Chunk chunk(spans + 2 * blockIdx.z, window, blockIdx.x);
  if (chunk.count <= 0 && gridDim.x > 1) return;
  const int group = heads / kv_heads, parts = (group + 15) / 16, kv_head = blockIdx.y / parts;
  const int first_head = blockIdx.y % parts * 16, rows = group - first_head < 16 ? group - first_head : 16;
  const size_t row = (size_t)blockIdx.z * heads + kv_head * group + first_head;
  const uint32_t stride = kv_heads * HeadDim;
  const bf16* const keys = k + chunk.first * stride + kv_head * HeadDim;
  const bf16* const values = v + chunk.first * stride + kv_head * HeadDim;

  const int tiles = chunk.count > warp * Keys ? (chunk.count - warp * Keys + Warps * Keys - 1) / (Warps * Keys) : 0;
  const int own = Stages + warp * 4 * TileBytes;
  const auto copy_keys = [&](int i) {
    const int first = (i * Warps + warp) * Keys, stage = own + (i & 1) * 2 * TileBytes;
    if (i < tiles) {
      copy_tile<HeadDim, Keys, 32>(stage, keys, first * stride, stride, chunk.count - first, lane);
      copy_tile<HeadDim, Keys, 32>(stage + TileBytes, values, first * stride, stride, chunk.count - first, lane);
    }
    cp_async_commit();
  };
  copy_tile<HeadDim, 16, 128>(0, q + row * HeadDim, 0, HeadDim, rows, thread);
  copy_keys(0);
  copy_keys(1);
  cp_async_wait<1>();
  __syncthreads();
  uint32_t queries[HeadDim / 16][1][4];
  const int a = lane_offset_a<HeadDim>(lane), b = lane_offset_b<HeadDim>(lane);
#pragma unroll
  for (int i = 0; i < HeadDim / 16; i++) ldmatrix_x4(queries[i][0], dynamic_shared + (a ^ i << 5));

  float outputs[1][HeadDim / 8][4];
  Softmax<1> softmax;
  clear(outputs);
  for (int i = 0; i < tiles; i++) {
    cp_async_wait<1>();
    __syncwarp();
    const int stage = own + (i & 1) * 2 * TileBytes, first = (i * Warps + warp) * Keys;
    float scores[1][Keys / 8][4];
    clear(scores);
#pragma unroll
    for (int j = 0; j < HeadDim / 16; j++) multiply_step<HeadDim>(scores, queries[j], (stage + b) ^ j << 5);
    if (first + Keys > chunk.count) {
#pragma unroll
      for (int n = 0; n < Keys / 8; n++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          if (first + n * 8 + (lane & 3) * 2 + (j & 1) >= chunk.count) scores[0][n][j] = -INFINITY;
        }
      }
    }
    softmax.update(scores, outputs, scale * LOG2E);
    multiply_weights<HeadDim>(outputs, scores, stage + TileBytes, lane);
    __syncwarp();
    copy_keys(i + 2);
  }
  cp_async_wait<0>();
  __syncthreads();

  // Column d of row r lies at d ^ 8·(r mod 4): the 16 lanes of an 8-byte store meet four rows in all banks.
  float* const sums = reinterpret_cast<float*>(dynamic_shared);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = (lane >> 2) + half * 8;
    const float total = softmax.total(0, half);
    if ((lane & 3) == 0) {
      tops[warp][r] = softmax.top(0, half) * (scale * LOG2E);
      totals[warp][r] = total;
    }
#pragma unroll
    for (int n = 0; n < HeadDim / 8; n++) {
      float2* const to = reinterpret_cast<float2*>(sums + (warp * 16 + r) * HeadDim + (n * 8 + (lane & 3) * 2 ^ 8 * (r & 3)));
      *to = make_float2(outputs[0][n][2 * half], outputs[0][n][2 * half + 1]);
    }
  }
  __syncthreads();
  for (int i = thread; i < rows * HeadDim; i += 128) {
    const int r = i / HeadDim, d = i % HeadDim;
    const float top = fmaxf(fmaxf(tops[0][r], tops[1][r]), fmaxf(tops[2][r], tops[3][r]));
    float sum = 0.f, total = 0.f;
#pragma unroll
    for (int w = 0; w < Warps; w++) {
      const float weight = tops[w][r] == -INFINITY ? 0.f : exp2_approx(tops[w][r] - top);
      sum = fmaf(weight, sums[(w * 16 + r) * HeadDim + (d ^ 8 * (r & 3))], sum);
      total = fmaf(weight, totals[w][r], total);
    }
    if (gridDim.x == 1) {
      o[row * HeadDim + i] = __float2bfloat16(sum * (total > 0.f ? 1.f / total : 0.f));
    } else {
      const size_t part = (row + r) * gridDim.x + blockIdx.x;
      partial[part * HeadDim + d] = sum;
      if (d == 0) stats[part] = make_float2(top, total);
    }
  }
}

#define FLASH_DECODE(name, head_dim)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(128, 3)                                                                                        \
      name(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, bf16* __restrict__ o,                          \
           float* __restrict__ partial, float2* __restrict__ stats, const uint32_t* __restrict__ spans, int heads, int kv_heads, float scale,    \
           uint32_t window) {                                                                                                                 \
    flash_decode<head_dim>(q, k, v, o, partial, stats, spans, heads, kv_heads, scale, window);                                                \
  }                                                                                                                                           \
  EXPORT(name)                                                                                                                                \
  SHARED_BYTES(name, (DECODE_KEYS + 16) * (head_dim) * 2)

// One chunk in all: O itself; more: the undivided sums [spans, heads, chunks, head_dim] and (maximum, sum) [spans, heads, chunks].
// grid: chunks × kv_heads · ceil(group / 16) × spans, block: 128, shared: 272 · 2 · head_dim bytes
FLASH_DECODE(attention_decode_flash_hd64_bf16, 64)
FLASH_DECODE(attention_decode_flash_hd128_bf16, 128)
