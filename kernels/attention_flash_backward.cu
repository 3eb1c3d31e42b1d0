// Gradients of attention with tensor cores (FlashAttention-2, arXiv 2307.08691), from Q, K, V, dO, lse [heads,
// tokens] and delta = rowsum(dO∘O) [heads, tokens] (attention.cu): P = exp(scale·Q·Kᵀ − lse), dS = P∘(dO·Vᵀ − delta),
//   dV = Pᵀ·dO,  dK = scale·dSᵀ·Q,  dQ = scale·dS·K.
// All bf16 but lse and delta, aligned to 16 bytes; head_dim 64 or 128. attention.cuh says which queries see which
// keys and how tiles lie in memory.
//
//   kernel                                      bytes                 FLOPs            time
//   attention_backward_key_flash_hd*_bf16       Q, dO, K, V, dK, dV   8·d a seen pair  1.60 ms
//   attention_backward_query_flash_hd*_bf16     Q, dO, K, V, dQ       6·d a seen pair  1.20 ms
//   attention_backward_reduce_bf16              8·parts + 4 a value of dK and dV
// Times are of 8192 tokens of one document, 28/4 heads of 128 (Qwen2.5-7B), at 600 TFLOP/s.
//
// Two kernels, so that sums have one order without atomics: a block of the first holds 64 keys and walks over the
// query tiles that see them, head by head of the group; a block of the second holds 64 queries of one head and walks
// over keys. Both compute S and dP: 14·d FLOPs a pair instead of the 10·d of one kernel that adds dQ with atomics. A
// kernel that adds dQ in a fixed order must either hold every key tile's share in memory (tokens² · d / 64 floats) or
// make blocks wait for one another. Where key-value heads × key tiles are too few blocks, the heads of a group are
// shared among `parts` blocks, whose f32 sums [parts, 2, tokens, kv_heads·head_dim] the reduce kernel adds in order.
// The first kernel works on Sᵀ = K·Qᵀ: rows are keys, so that Pᵀ and dSᵀ go from the accumulators of one product into
// the A operand of the next without a way through shared memory. Tiles come through two stages of cp.async, one
// barrier a tile. At head_dim 128 the 98 KiB of a block fit twice into the 228 KiB of an H100's multiprocessor, but
// once into the 164 KiB of an A100's: 4 warps; at head_dim 64, three blocks on both.
//
// Rounds: P and dS to bf16 before the products with them, each result once. Sums are f32, over heads, then tiles of
// 64 rows, in ascending order. Banks: as attention.cuh.
// Versions: these, where attention_backward_sm90.cu does not run or its blocks of 128 rows would leave
// multiprocessors idle.
#include "attention.cuh"

constexpr int THREADS = 128, ROWS = 64;

// Shared memory: the block's own two tiles (K and V; Q and dO), then two stages of the two streamed ones (Q and dO; K
// and V).
template <int HeadDim> struct SmemLayout {
  static constexpr int TILE_BYTES = ROWS * HeadDim * 2, BYTES = 6 * TILE_BYTES;

  static __device__ __forceinline__ int own(int tensor, int row) { return tensor * TILE_BYTES + row * HeadDim * 2; }
  static __device__ __forceinline__ int streamed(int step, int tensor) {
    return (2 + (step & 1) * 2 + tensor) * TILE_BYTES;
  }
};

// Starts the copies of rows `offset` .. of two tensors of the same shape.
template <int HeadDim>
__device__ __forceinline__ void load_pair(int first_tile, int second_tile, const bf16* first, const bf16* second,
                                          uint32_t offset, uint32_t stride, int rows) {
  cp_async_tile<HeadDim, ROWS, THREADS>(first_tile, first, offset, stride, rows, threadIdx.x);
  cp_async_tile<HeadDim, ROWS, THREADS>(second_tile, second, offset, stride, rows, threadIdx.x);
}

template <int HeadDim>
__device__ __forceinline__ void flash_backward_key(const bf16* __restrict__ q, const bf16* __restrict__ k,
                                                   const bf16* __restrict__ v, const bf16* __restrict__ d_o,
                                                   const float* __restrict__ lse, const float* __restrict__ delta,
                                                   bf16* __restrict__ dk, bf16* __restrict__ dv,
                                                   float* __restrict__ partial, Documents documents, int tokens,
                                                   int heads, int kv_heads, int parts, float scale) {
  using Smem = SmemLayout<HeadDim>;
  __shared__ int last_queries[ROWS];
  __shared__ float stats[2][2 * ROWS];
  const int thread = threadIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const HeadRange range(blockIdx.x, parts, heads, kv_heads);
  const int first_row = blockIdx.y * ROWS, rows = tokens - first_row < ROWS ? tokens - first_row : ROWS;
  const uint32_t q_stride = heads * HeadDim, kv_stride = kv_heads * HeadDim;
  const uint32_t kv_offset = first_row * kv_stride + range.kv_head * HeadDim;

  load_pair<HeadDim>(Smem::own(0, 0), Smem::own(1, 0), k, v, kv_offset, kv_stride, rows);
  if (warp == 0) documents.find_last_queries<ROWS>(last_queries, first_row, first_row + rows - 1);
  __syncthreads();
  // A step is one query tile of one head; queries after last_queries[0] do not see all keys of this block.
  const int q_tiles = last_queries[ROWS - 1] / ROWS + 1 - (int)blockIdx.y, steps = range.count * q_tiles;

  const auto load_queries = [&](int step) {
    const int row = first_row + step % q_tiles * ROWS;
    const uint32_t offset = row * q_stride + (range.first + step / q_tiles) * HeadDim;
    load_pair<HeadDim>(Smem::streamed(step, 0), Smem::streamed(step, 1), q, d_o, offset, q_stride, tokens - row);
    cp_async_commit();
  };
  // Half of the threads carry lse · log2 e, half delta, each of one query.
  const auto load_stat = [&](int step) {
    const int row = first_row + step % q_tiles * ROWS + (thread & 63);
    const size_t offset = (size_t)(range.first + step / q_tiles) * tokens + row;
    if (row >= tokens) return 0.f;
    return thread < ROWS ? lse[offset] * LOG2E : delta[offset];
  };

  float dk_acc[1][HeadDim / 8][4], dv_acc[1][HeadDim / 8][4];
  zero(dk_acc);
  zero(dv_acc);
  load_queries(0);
  stats[0][thread] = load_stat(0);
  for (int step = 0; step < steps; step++) {
    cp_async_wait<0>();
    __syncthreads();
    float next_stat = 0.f;
    if (step + 1 < steps) {
      load_queries(step + 1);
      next_stat = load_stat(step + 1);
    }
    const int q_tile = Smem::streamed(step, 0), do_tile = Smem::streamed(step, 1);
    const float* const step_lse = stats[step & 1] + (lane & 3) * 2;
    float p[1][ROWS / 8][4], ds[1][ROWS / 8][4];
    zero(p);
    mma_ABt<HeadDim>(p, Smem::own(0, warp * 16), q_tile, lane);
    recompute_p(p[0], scale * LOG2E, [&](int n, int i) { return step_lse[n * 8 + (i & 1)]; });
    const int first_query = first_row + step % q_tiles * ROWS;
    if (first_query < first_row + ROWS - 1 || first_query + ROWS - 1 > last_queries[0]) {
      const int row = warp * 16 + (lane >> 2);
      const int last[2] = {last_queries[row], last_queries[row + 8]};
      mask_queries(p[0], first_query + (lane & 3) * 2, first_row + row, last, 0.f);
    }
    mma_AB<HeadDim>(dv_acc, p, do_tile, lane);
    zero(ds);
    mma_ABt<HeadDim>(ds, Smem::own(1, warp * 16), do_tile, lane);
    softmax_backward(ds[0], p[0], [&](int n, int i) { return step_lse[ROWS + n * 8 + (i & 1)]; });
    mma_AB<HeadDim>(dk_acc, ds, q_tile, lane);
    stats[(step + 1) & 1][thread] = next_stat;
  }

  // Gradients pass through the warp's own rows of K and V.
  const int row = warp * 16;
  if (parts == 1) {
    const uint32_t offset = kv_offset + row * kv_stride;
    store_rows<HeadDim>(dk + offset, kv_stride, rows - row, dk_acc[0], scale, scale, Smem::own(0, row), lane);
    store_rows<HeadDim>(dv + offset, kv_stride, rows - row, dv_acc[0], 1.f, 1.f, Smem::own(0, row), lane);
    return;
  }
  const size_t plane = (size_t)tokens * kv_stride;
  float* const to = partial + range.part * 2 * plane + kv_offset + row * kv_stride;
  store_rows_f32<HeadDim>(to, kv_stride, rows - row, dk_acc[0], scale, lane);
  store_rows_f32<HeadDim>(to + plane, kv_stride, rows - row, dv_acc[0], 1.f, lane);
}

template <int HeadDim>
__device__ __forceinline__ void flash_backward_query(const bf16* __restrict__ q, const bf16* __restrict__ k,
                                                     const bf16* __restrict__ v, const bf16* __restrict__ d_o,
                                                     const float* __restrict__ lse, const float* __restrict__ delta,
                                                     bf16* __restrict__ dq, Documents documents, int tokens, int heads,
                                                     int kv_heads, float scale) {
  using Smem = SmemLayout<HeadDim>;
  __shared__ int first_keys[ROWS];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int head = blockIdx.x, kv_head = head / (heads / kv_heads), first_row = (gridDim.y - 1 - blockIdx.y) * ROWS;
  const int rows = tokens - first_row < ROWS ? tokens - first_row : ROWS, last_row = first_row + rows - 1;
  const uint32_t q_stride = heads * HeadDim, kv_stride = kv_heads * HeadDim;
  const uint32_t q_offset = first_row * q_stride + head * HeadDim;

  load_pair<HeadDim>(Smem::own(0, 0), Smem::own(1, 0), q, d_o, q_offset, q_stride, rows);
  if (warp == 0) documents.find_first_keys<ROWS>(first_keys, first_row, last_row);
  __syncthreads();
  const int tile_begin = first_keys[0] / ROWS, tile_end = last_row / ROWS + 1;

  const auto load_keys = [&](int tile) {
    const uint32_t offset = tile * ROWS * kv_stride + kv_head * HeadDim;
    const int kv_rows = tokens - tile * ROWS;
    load_pair<HeadDim>(Smem::streamed(tile, 0), Smem::streamed(tile, 1), k, v, offset, kv_stride, kv_rows);
    cp_async_commit();
  };
  load_keys(tile_begin);

  const int row = warp * 16 + (lane >> 2);
  float row_lse[2], row_delta[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const bool inside = row + half * 8 < rows;
    const size_t offset = (size_t)head * tokens + first_row + row + half * 8;
    row_lse[half] = inside ? lse[offset] * LOG2E : 0.f;
    row_delta[half] = inside ? delta[offset] : 0.f;
  }
  float dq_acc[1][HeadDim / 8][4];
  zero(dq_acc);
  for (int tile = tile_begin; tile < tile_end; tile++) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < tile_end) load_keys(tile + 1);
    const int k_tile = Smem::streamed(tile, 0), v_tile = Smem::streamed(tile, 1);
    float p[1][ROWS / 8][4], ds[1][ROWS / 8][4];
    zero(p);
    zero(ds);
    mma_ABt<HeadDim>(p, Smem::own(0, warp * 16), k_tile, lane);
    mma_ABt<HeadDim>(ds, Smem::own(1, warp * 16), v_tile, lane);
    recompute_p(p[0], scale * LOG2E, [&](int, int i) { return row_lse[i >> 1]; });
    softmax_backward(ds[0], p[0], [&](int, int i) { return row_delta[i >> 1]; });
    if (tile * ROWS < first_keys[ROWS - 1] || tile * ROWS + ROWS - 1 > first_row) {
      const int first[2] = {first_keys[row], first_keys[row + 8]};
      mask_keys(ds[0], tile * ROWS + (lane & 3) * 2, first_row + row, first, 0.f);
    }
    mma_AB<HeadDim>(dq_acc, ds, k_tile, lane);
  }

  // dQ passes through the warp's own rows of Q.
  bf16* const to = dq + q_offset + warp * 16 * q_stride;
  store_rows<HeadDim>(to, q_stride, rows - warp * 16, dq_acc[0], scale, scale, Smem::own(0, warp * 16), lane);
}

#define FLASH_BACKWARD(key_name, query_name, head_dim, key_registers, query_registers)                                 \
  extern "C" __global__ void __maxnreg__(key_registers)                                                                \
      key_name(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,                     \
               const bf16* __restrict__ d_o, const float* __restrict__ lse, const float* __restrict__ delta,           \
               bf16* __restrict__ dk, bf16* __restrict__ dv, float* __restrict__ partial,                              \
               const uint32_t* __restrict__ starts, int documents, int tokens, int heads, int kv_heads, int parts,     \
               float scale, uint32_t window) {                                                                         \
    const Documents packed{starts, documents, window};                                                                 \
    flash_backward_key<head_dim>(q, k, v, d_o, lse, delta, dk, dv, partial, packed, tokens, heads, kv_heads, parts,    \
                                 scale);                                                                               \
  }                                                                                                                    \
  EXPORT(key_name)                                                                                                     \
  SHARED_BYTES(key_name, SmemLayout<head_dim>::BYTES)                                                                  \
  extern "C" __global__ void __maxnreg__(query_registers)                                                              \
      query_name(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,                   \
                 const bf16* __restrict__ d_o, const float* __restrict__ lse, const float* __restrict__ delta,         \
                 bf16* __restrict__ dq, const uint32_t* __restrict__ starts, int documents, int tokens, int heads,     \
                 int kv_heads, float scale, uint32_t window) {                                                         \
    const Documents packed{starts, documents, window};                                                                 \
    flash_backward_query<head_dim>(q, k, v, d_o, lse, delta, dq, packed, tokens, heads, kv_heads, scale);              \
  }                                                                                                                    \
  EXPORT(query_name)                                                                                                   \
  SHARED_BYTES(query_name, SmemLayout<head_dim>::BYTES)

// key: grid kv_heads · parts × ceil(tokens / 64); query: grid heads × ceil(tokens / 64); block: 128, shared: 768 ·
// head_dim bytes
FLASH_BACKWARD(attention_backward_key_flash_hd64_bf16, attention_backward_query_flash_hd64_bf16, 64, 168, 158)
FLASH_BACKWARD(attention_backward_key_flash_hd128_bf16, attention_backward_query_flash_hd128_bf16, 128, 247, 198)

// Adds the parts of four values of dK or dV, in order; n = tokens · kv_heads · head_dim, a multiple of 4.
// grid: ceil(n / 1024) × 2 (dK, dV), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(256)
    attention_backward_reduce_bf16(const float* __restrict__ partial, bf16* __restrict__ dk, bf16* __restrict__ dv,
                                   uint64_t n, int parts) {
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
