// Gradients of attention with tensor cores (FlashAttention-2, arXiv 2307.08691), from Q, K, V, dO, lse [heads, tokens] and
// D = rowsum(dO∘O) [heads, tokens] (attention.cu): P = exp(scale·Q·Kᵀ − lse), dS = P∘(dO·Vᵀ − D),
//   dV = Pᵀ·dO,  dK = scale·dSᵀ·Q,  dQ = scale·dS·K.
// All bf16 but lse and D, aligned to 16 bytes; head_dim 64 or 128. attention.cuh says which rows see which and how tiles lie in memory.
//
//   kernel                                      bytes                 FLOPs            8192 tokens, 28/4 heads of 128, 600 TFLOP/s
//   attention_backward_key_flash_hd*_bf16       Q, dO, K, V, dK, dV   8·d a seen pair  1.60 ms
//   attention_backward_query_flash_hd*_bf16     Q, dO, K, V, dQ       6·d a seen pair  1.20 ms
//   attention_backward_reduce_bf16              8·parts + 4 a value of dK and dV
//
// Two kernels, so that sums have one order without atomics: a block of the first owns 64 keys and walks over the query tiles that see them,
// head by head of the group; a block of the second owns 64 queries of one head and walks over keys. Both compute S and dP: 14·d FLOPs a pair
// instead of the 10·d of one kernel that adds dQ with atomics. A kernel that adds dQ in a fixed order must either hold every key
// tile's share in memory (tokens² · d / 64 floats) or make blocks wait for one another.
// Where key-value heads × key tiles are too few blocks, the heads of a group are shared among `parts` blocks, whose f32 sums
// [parts, 2, tokens, kv_heads·head_dim] the reduce kernel adds in order.
// The first kernel works on Sᵀ = K·Qᵀ: rows are keys, so that Pᵀ and dSᵀ go from the sums of one product into the A operand of the next
// without a way through shared memory. Tiles come through two buffers of cp.async, one barrier a tile.
// Rounds: P and dS to bf16 before the products with them, each result once. Banks: as attention.cuh.
#include "attention.cuh"

constexpr int ROWS = 64;

// P from scores, where column n of a row is seen if `from` ≤ n ≤ `to`; the lse (times log2 e) is that of the row or the column.
template <int HeadDim>
__device__ __forceinline__ void flash_backward_key(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                                                   const bf16* __restrict__ d_o, const float* __restrict__ lse, const float* __restrict__ delta,
                                                   bf16* __restrict__ dk, bf16* __restrict__ dv, float* __restrict__ partial, Documents documents,
                                                   int tokens, int heads, int kv_heads, int parts, float scale) {
  constexpr int TileBytes = ROWS * HeadDim * 2, Columns = ROWS / 8, Values = TileBytes, Stages = 2 * TileBytes;
  __shared__ int last_queries[ROWS];
  __shared__ float stats[2][2 * ROWS];
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int kv_head = blockIdx.x / parts, part = blockIdx.x % parts, group = heads / kv_heads, share = (group + parts - 1) / parts;
  const int first_head = kv_head * group + part * share;
  const int heads_here = group - part * share < share ? group - part * share : share;
  const int first_row = blockIdx.y * ROWS, rows = tokens - first_row < ROWS ? tokens - first_row : ROWS;
  const uint32_t q_stride = heads * HeadDim, kv_stride = kv_heads * HeadDim, kv_at = first_row * kv_stride + kv_head * HeadDim;

  copy_tile<HeadDim, ROWS, 128>(0, k, kv_at, kv_stride, rows, thread);
  copy_tile<HeadDim, ROWS, 128>(Values, v, kv_at, kv_stride, rows, thread);
  const int all_until = documents.last_query(first_row), tiles = documents.last_query(first_row + rows - 1) / ROWS + 1 - blockIdx.y;
  if (thread < ROWS) last_queries[thread] = thread < rows ? documents.last_query(first_row + thread) : -1;

  // Of the item after the last this reads nothing.
  const auto copy_queries = [&](int item) {
    const int stage = Stages + (item & 1) * 2 * TileBytes, row = first_row + item % tiles * ROWS;
    const uint32_t at = row * q_stride + (first_head + item / tiles) * HeadDim;
    copy_tile<HeadDim, ROWS, 128>(stage, q, at, q_stride, tokens - row, thread);
    copy_tile<HeadDim, ROWS, 128>(stage + TileBytes, d_o, at, q_stride, tokens - row, thread);
    cp_async_commit();
  };
  // Half of the threads carry lse · log2 e, half D, each of one query.
  const auto load_stat = [&](int item) {
    const int row = first_row + item % tiles * ROWS + (thread & 63);
    const size_t at = (size_t)(first_head + item / tiles) * tokens + row;
    if (row >= tokens) return 0.f;
    return thread < ROWS ? lse[at] * LOG2E : delta[at];
  };

  const int items = heads_here * tiles;
  float dks[1][HeadDim / 8][4], dvs[1][HeadDim / 8][4];
  clear(dks);
  clear(dvs);
  copy_queries(0);
  stats[0][thread] = load_stat(0);
  for (int item = 0; item < items; item++) {
    cp_async_wait<0>();
    __syncthreads();
    float next = 0.f;
    if (item + 1 < items) {
      copy_queries(item + 1);
      next = load_stat(item + 1);
    }
    const int queries = Stages + (item & 1) * 2 * TileBytes, own = warp * 16 * HeadDim * 2;
    const float* const row_stats = stats[item & 1] + (lane & 3) * 2;
    float p[1][Columns][4];
    clear(p);
    multiply_transposed<HeadDim>(p, own, queries, lane);
    const float scale_log2 = scale * LOG2E;
#pragma unroll
    for (int n = 0; n < Columns; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) p[0][n][i] = exp2_approx(p[0][n][i] * scale_log2 - row_stats[n * 8 + (i & 1)]);
    }
    const int first_query = first_row + item % tiles * ROWS;
    if (first_query < first_row + ROWS - 1 || first_query + ROWS - 1 > all_until) {
      const int row = warp * 16 + (lane >> 2);
      const int last[2] = {last_queries[row], last_queries[row + 8]};
#pragma unroll
      for (int n = 0; n < Columns; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int query = first_query + n * 8 + (lane & 3) * 2 + (i & 1);
          if (query < first_row + row + (i >> 1) * 8 || query > last[i >> 1]) p[0][n][i] = 0.f;
        }
      }
    }
    multiply_weights<HeadDim>(dvs, p, queries + TileBytes, lane);
    float ds[1][Columns][4];
    clear(ds);
    multiply_transposed<HeadDim>(ds, Values + own, queries + TileBytes, lane);
#pragma unroll
    for (int n = 0; n < Columns; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) ds[0][n][i] = p[0][n][i] * (ds[0][n][i] - row_stats[ROWS + n * 8 + (i & 1)]);
    }
    multiply_weights<HeadDim>(dks, ds, queries, lane);
    stats[(item + 1) & 1][thread] = next;
  }

  const int row = warp * 16, own = row * HeadDim * 2;
  if (parts == 1) {
    const uint32_t at = kv_at + row * kv_stride;
    store_rows<HeadDim>(dk + at, kv_stride, rows - row, dks[0], scale, scale, own, lane);
    store_rows<HeadDim>(dv + at, kv_stride, rows - row, dvs[0], 1.f, 1.f, own, lane);
    return;
  }
  const size_t plane = (size_t)tokens * kv_stride;
  float* const to = partial + part * 2 * plane + kv_at + row * kv_stride;
  store_floats<HeadDim>(to, kv_stride, rows - row, dks[0], scale, lane);
  store_floats<HeadDim>(to + plane, kv_stride, rows - row, dvs[0], 1.f, lane);
}

template <int HeadDim>
__device__ __forceinline__ void flash_backward_query(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                                                     const bf16* __restrict__ d_o, const float* __restrict__ lse, const float* __restrict__ delta,
                                                     bf16* __restrict__ dq, Documents documents, int tokens, int heads, int kv_heads, float scale) {
  constexpr int TileBytes = ROWS * HeadDim * 2, Columns = ROWS / 8, Gradients = TileBytes, Stages = 2 * TileBytes;
  __shared__ int first_keys[ROWS];
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31;
  const int head = blockIdx.x, kv_head = head / (heads / kv_heads), first_row = (gridDim.y - 1 - blockIdx.y) * ROWS;
  const int rows = tokens - first_row < ROWS ? tokens - first_row : ROWS;
  const uint32_t q_stride = heads * HeadDim, kv_stride = kv_heads * HeadDim, q_at = first_row * q_stride + head * HeadDim;

  copy_tile<HeadDim, ROWS, 128>(0, q, q_at, q_stride, rows, thread);
  copy_tile<HeadDim, ROWS, 128>(Gradients, d_o, q_at, q_stride, rows, thread);
  const int first_tile = documents.first_key(first_row) / ROWS, tiles = (first_row + rows - 1) / ROWS + 1;
  const int all_see = documents.first_key(first_row + rows - 1);
  if (thread < ROWS) first_keys[thread] = documents.first_key(first_row + (thread < rows ? thread : rows - 1));

  const auto copy_keys = [&](int tile) {
    const int stage = Stages + (tile & 1) * 2 * TileBytes;
    const uint32_t at = tile * ROWS * kv_stride + kv_head * HeadDim;
    copy_tile<HeadDim, ROWS, 128>(stage, k, at, kv_stride, tokens - tile * ROWS, thread);
    copy_tile<HeadDim, ROWS, 128>(stage + TileBytes, v, at, kv_stride, tokens - tile * ROWS, thread);
    cp_async_commit();
  };
  copy_keys(first_tile);

  const int row = warp * 16 + (lane >> 2), own = warp * 16 * HeadDim * 2;
  float row_lse[2], row_delta[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const bool inside = row + half * 8 < rows;
    const size_t at = (size_t)head * tokens + first_row + row + half * 8;
    row_lse[half] = inside ? lse[at] * LOG2E : 0.f;
    row_delta[half] = inside ? delta[at] : 0.f;
  }
  const float scale_log2 = scale * LOG2E;
  float dqs[1][HeadDim / 8][4];
  clear(dqs);
  for (int tile = first_tile; tile < tiles; tile++) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < tiles) copy_keys(tile + 1);
    const int keys = Stages + (tile & 1) * 2 * TileBytes;
    float p[1][Columns][4], ds[1][Columns][4];
    clear(p);
    clear(ds);
    multiply_transposed<HeadDim>(p, own, keys, lane);
    multiply_transposed<HeadDim>(ds, Gradients + own, keys + TileBytes, lane);
#pragma unroll
    for (int n = 0; n < Columns; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        p[0][n][i] = exp2_approx(p[0][n][i] * scale_log2 - row_lse[i >> 1]);
        ds[0][n][i] = p[0][n][i] * (ds[0][n][i] - row_delta[i >> 1]);
      }
    }
    if (tile * ROWS < all_see || tile * ROWS + ROWS - 1 > first_row) {
      const int first[2] = {first_keys[row], first_keys[row + 8]};
#pragma unroll
      for (int n = 0; n < Columns; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int key = tile * ROWS + n * 8 + (lane & 3) * 2 + (i & 1);
          if (key > first_row + row + (i >> 1) * 8 || key < first[i >> 1]) ds[0][n][i] = 0.f;
        }
      }
    }
    multiply_weights<HeadDim>(dqs, ds, keys, lane);
  }
  store_rows<HeadDim>(dq + q_at + warp * 16 * q_stride, q_stride, rows - warp * 16, dqs[0], scale, scale, own, lane);
}

#define FLASH_BACKWARD(key_name, query_name, head_dim, blocks)                                                                                  \
  extern "C" __global__ void __launch_bounds__(128, blocks)                                                                                     \
      key_name(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, const bf16* __restrict__ d_o,                \
               const float* __restrict__ lse, const float* __restrict__ delta, bf16* __restrict__ dk, bf16* __restrict__ dv,                    \
               float* __restrict__ partial, const uint32_t* __restrict__ starts, int documents, int tokens, int heads, int kv_heads, int parts, \
               float scale, uint32_t window) {                                                                                                  \
    flash_backward_key<head_dim>(q, k, v, d_o, lse, delta, dk, dv, partial, Documents{starts, documents, window}, tokens, heads, kv_heads,      \
                                 parts, scale);                                                                                                 \
  }                                                                                                                                             \
  EXPORT(key_name)                                                                                                                              \
  SHARED_BYTES(key_name, 6 * ROWS * (head_dim) * 2)                                                                                             \
  extern "C" __global__ void __launch_bounds__(128, blocks)                                                                                     \
      query_name(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v, const bf16* __restrict__ d_o,              \
                 const float* __restrict__ lse, const float* __restrict__ delta, bf16* __restrict__ dq, const uint32_t* __restrict__ starts,    \
                 int documents, int tokens, int heads, int kv_heads, float scale, uint32_t window) {                                            \
    flash_backward_query<head_dim>(q, k, v, d_o, lse, delta, dq, Documents{starts, documents, window}, tokens, heads, kv_heads, scale);         \
  }                                                                                                                                             \
  EXPORT(query_name)                                                                                                                                                            \
  SHARED_BYTES(query_name, 6 * ROWS * (head_dim) * 2)

// key: grid kv_heads · parts × ceil(tokens / 64); query: grid heads × ceil(tokens / 64); block: 128, shared: 768 · head_dim bytes
FLASH_BACKWARD(attention_backward_key_flash_hd64_bf16, attention_backward_query_flash_hd64_bf16, 64, 3)
FLASH_BACKWARD(attention_backward_key_flash_hd128_bf16, attention_backward_query_flash_hd128_bf16, 128, 2)

// Adds the parts of four values of dK or dV, in order; n = tokens · kv_heads · head_dim, a multiple of 4.
// grid: ceil(n / 1024) × 2 (dK, dV), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(256) attention_backward_reduce_bf16(const float* __restrict__ partial, bf16* __restrict__ dk,
                                                                                bf16* __restrict__ dv, uint64_t n, int parts) {
  const uint64_t i = ((uint64_t)blockIdx.x * 256 + threadIdx.x) * 4;
  if (i >= n) return;
  partial += blockIdx.y * n + i;
  float4 sum = *reinterpret_cast<const float4*>(partial);
  for (int part = 1; part < parts; part++) {
    const float4 next = *reinterpret_cast<const float4*>(partial + part * 2 * n);
    sum.x += next.x;
    sum.y += next.y;
    sum.z += next.z;
    sum.w += next.w;
  }
  bf16* const to = blockIdx.y == 0 ? dk : dv;
  *reinterpret_cast<uint2*>(to + i) = make_uint2(pack2(sum.x, sum.y), pack2(sum.z, sum.w));
}
EXPORT(attention_backward_reduce_bf16)
