// Attention by the definition, for any head_dim up to 256 and pointers aligned to an element: O = softmax(scale ·
// Q·Kᵀ, causal inside documents) · V, lse [heads, tokens] (natural log-sum-exp of the scores of a row), and its
// gradients
//   delta = rowsum(dO∘O),  P = exp(scale·Q·Kᵀ − lse),  dS = P∘(dO·Vᵀ − delta),
//   dV = Pᵀ·dO,  dQ = scale·dS·K,  dK = scale·dSᵀ·Q;
// and the form for a key-value cache, one query a span of rows, in chunks of 256 keys that
// attention_decode_combine_bf16 puts together. Q, O, dO, dQ [tokens, heads·head_dim], K, V, dK, dV [tokens,
// kv_heads·head_dim], all bf16; delta, lse f32.
//
//   kernel                                       FLOPs a seen pair and head   bytes read a seen pair and head
//   attention_forward_baseline_bf16              4·d                          4·d (L1 and L2 hold most)
//   attention_backward_query_baseline_bf16       6·d                          6·d
//   attention_backward_key_baseline_bf16         8·d                          8·d
//   attention_decode_baseline_bf16               4·d                          4·d (once a query head)
//   attention_backward_delta_*_bf16              2·d a row                    4·d a row
// delta of 8192 tokens, 28 heads of 128, 3.0 TB/s: 0.04 ms.
//
// Everything is f32 inside and is rounded once, at the end. A warp owns a row of the result; its lanes share 32 keys
// (or queries) for the scores, then the columns for the sums, which run over keys (queries; heads of the group, then
// queries) in ascending order.
// Versions: these, the baseline; attention_flash.cu, attention_flash_backward.cu, attention_decode.cu (tensor cores)
// and the *_sm90.cu win by far where head_dim is 64 or 128. attention_backward_delta_vec8_bf16 and
// attention_decode_combine_bf16 serve those.
#include "attention.cuh"

constexpr int WARPS = 4, MAX_HEAD_DIM = 256, PARTS = MAX_HEAD_DIM / 32;

// The warp's copy of a row in f32.
__device__ __forceinline__ void load_row(float* row, const bf16* from, int head_dim, int lane) {
  for (int d = lane; d < head_dim; d += 32) row[d] = __bfloat162float(from[d]);
}

__device__ __forceinline__ float dot_row(const float* row, const bf16* other, int head_dim) {
  float sum = 0.f;
  for (int d = 0; d < head_dim; d++) sum = fmaf(row[d], __bfloat162float(other[d]), sum);
  return sum;
}

// sums[i] += Σ weights[j] · rows[j][32·i + lane] over `count` rows that are `stride` apart.
__device__ __forceinline__ void add_rows(float (&sums)[PARTS], const float* weights, const bf16* rows, size_t stride,
                                         int count, int head_dim, int lane) {
  for (int j = 0; j < count; j++) {
    const float weight = weights[j];
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const int d = i * 32 + lane;
      if (d < head_dim) sums[i] = fmaf(weight, __bfloat162float(rows[j * stride + d]), sums[i]);
    }
  }
}

__device__ __forceinline__ void store_parts(bf16* to, const float (&sums)[PARTS], float factor, int head_dim,
                                            int lane) {
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    const int d = i * 32 + lane;
    if (d < head_dim) to[d] = __float2bfloat16(sums[i] * factor);
  }
}

// Online softmax of the query in `query` over `count` keys: weighted sum of the values (not yet divided), maximum of
// scale_log2·score, sum.
__device__ __forceinline__ void attend(const float* query, float* weights, const bf16* k, const bf16* v, size_t stride,
                                       int count, int head_dim, float scale_log2, int lane, float (&sums)[PARTS],
                                       float& row_max, float& row_sum) {
  row_max = -INFINITY;
  row_sum = 0.f;
#pragma unroll
  for (int i = 0; i < PARTS; i++) sums[i] = 0.f;
  for (int base = 0; base < count; base += 32) {
    const int tile = count - base < 32 ? count - base : 32;
    float score = -INFINITY;
    if (lane < tile) score = dot_row(query, k + (base + lane) * stride, head_dim) * scale_log2;
    const float largest = fmaxf(row_max, warp_max(score)), factor = exp2f(row_max - largest);
    const float weight = lane < tile ? exp2f(score - largest) : 0.f;
    row_max = largest;
    row_sum = row_sum * factor + warp_sum(weight);
    weights[lane] = weight;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < PARTS; i++) sums[i] *= factor;
    add_rows(sums, weights, v + base * stride, stride, tile, head_dim, lane);
    __syncwarp();
  }
}

// grid: ceil(tokens / 4) × heads, block: 128, no dynamic shared memory; lse may be null
extern "C" __global__ void __launch_bounds__(128)
    attention_forward_baseline_bf16(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                                    bf16* __restrict__ o, float* __restrict__ lse, const uint32_t* __restrict__ starts,
                                    int documents, int tokens, int heads, int kv_heads, int head_dim, float scale,
                                    uint32_t window) {
  __shared__ float queries[WARPS][MAX_HEAD_DIM], weights[WARPS][32];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, head = blockIdx.y, row = blockIdx.x * WARPS + warp;
  if (row >= tokens) return;
  const size_t q_offset = ((size_t)row * heads + head) * head_dim, stride = (size_t)kv_heads * head_dim;
  load_row(queries[warp], q + q_offset, head_dim, lane);
  __syncwarp();
  const int first = Documents{starts, documents, window}.first_key(row);
  const size_t kv_offset = first * stride + head / (heads / kv_heads) * head_dim;
  float sums[PARTS], row_max, row_sum;
  attend(queries[warp], weights[warp], k + kv_offset, v + kv_offset, stride, row + 1 - first, head_dim, scale * LOG2E,
         lane, sums, row_max, row_sum);
  store_parts(o + q_offset, sums, 1.f / row_sum, head_dim, lane);
  if (lse != nullptr && lane == 0) lse[(size_t)head * tokens + row] = row_max * LN2 + logf(row_sum);
}
EXPORT(attention_forward_baseline_bf16)

// delta [heads, tokens]. grid: ceil(tokens · heads / 4), block: 128, no dynamic shared memory
extern "C" __global__ void __launch_bounds__(128)
    attention_backward_delta_baseline_bf16(const bf16* __restrict__ o, const bf16* __restrict__ d_o,
                                           float* __restrict__ delta, int tokens, int heads, int head_dim) {
  const int lane = threadIdx.x & 31;
  const size_t row = (size_t)blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (row >= (size_t)tokens * heads) return;
  float sum = 0.f;
  for (int d = lane; d < head_dim; d += 32) {
    sum = fmaf(__bfloat162float(o[row * head_dim + d]), __bfloat162float(d_o[row * head_dim + d]), sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) delta[row % heads * tokens + row / heads] = sum;
}
EXPORT(attention_backward_delta_baseline_bf16)

// The same, 16 bytes a lane: head_dim / 8 (a power of two up to 32) lanes share a row, so that a warp reads 512 bytes
// of each tensor at once. grid: ceil(tokens · heads · head_dim / 2048), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(256)
    attention_backward_delta_vec8_bf16(const uint4* __restrict__ o, const uint4* __restrict__ d_o,
                                       float* __restrict__ delta, int tokens, int heads, int head_dim) {
  const int lanes = head_dim / 8;
  const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x, row = i / lanes;
  const bool inside = row < (size_t)tokens * heads;
  float sum = 0.f;
  if (inside) {
    float x[8], dx[8];
    unpack8(o[i], x);
    unpack8(d_o[i], dx);
#pragma unroll
    for (int j = 0; j < 8; j++) sum = fmaf(x[j], dx[j], sum);
  }
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (inside && i % lanes == 0) delta[row % heads * tokens + row / heads] = sum;
}
EXPORT(attention_backward_delta_vec8_bf16)

// dQ. grid: ceil(tokens / 4) × heads, block: 128, no dynamic shared memory
extern "C" __global__ void __launch_bounds__(128)
    attention_backward_query_baseline_bf16(const bf16* __restrict__ q, const bf16* __restrict__ k,
                                           const bf16* __restrict__ v, const bf16* __restrict__ d_o,
                                           const float* __restrict__ lse,
                                           const float* __restrict__ delta, bf16* __restrict__ dq,
                                           const uint32_t* __restrict__ starts, int documents, int tokens, int heads,
                                           int kv_heads, int head_dim, float scale, uint32_t window) {
  __shared__ float queries[WARPS][MAX_HEAD_DIM], gradients[WARPS][MAX_HEAD_DIM], weights[WARPS][32];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, head = blockIdx.y, row = blockIdx.x * WARPS + warp;
  if (row >= tokens) return;
  const size_t q_offset = ((size_t)row * heads + head) * head_dim, stride = (size_t)kv_heads * head_dim;
  load_row(queries[warp], q + q_offset, head_dim, lane);
  load_row(gradients[warp], d_o + q_offset, head_dim, lane);
  __syncwarp();
  const int first = Documents{starts, documents, window}.first_key(row);
  const float row_lse = lse[(size_t)head * tokens + row], row_delta = delta[(size_t)head * tokens + row];
  float sums[PARTS] = {};
  for (int base = first; base <= row; base += 32) {
    const int tile = row + 1 - base < 32 ? row + 1 - base : 32;
    const size_t kv_offset = base * stride + head / (heads / kv_heads) * head_dim;
    float ds = 0.f;
    if (lane < tile) {
      const float p = expf(dot_row(queries[warp], k + kv_offset + lane * stride, head_dim) * scale - row_lse);
      ds = p * (dot_row(gradients[warp], v + kv_offset + lane * stride, head_dim) - row_delta);
    }
    weights[warp][lane] = ds;
    __syncwarp();
    add_rows(sums, weights[warp], k + kv_offset, stride, tile, head_dim, lane);
    __syncwarp();
  }
  store_parts(dq + q_offset, sums, scale, head_dim, lane);
}
EXPORT(attention_backward_query_baseline_bf16)

// dK, dV. grid: ceil(tokens / 4) × kv_heads, block: 128, no dynamic shared memory
extern "C" __global__ void __launch_bounds__(128)
    attention_backward_key_baseline_bf16(const bf16* __restrict__ q, const bf16* __restrict__ k,
                                         const bf16* __restrict__ v, const bf16* __restrict__ d_o,
                                         const float* __restrict__ lse,
                                         const float* __restrict__ delta, bf16* __restrict__ dk, bf16* __restrict__ dv,
                                         const uint32_t* __restrict__ starts, int documents, int tokens, int heads,
                                         int kv_heads, int head_dim, float scale, uint32_t window) {
  __shared__ float keys[WARPS][MAX_HEAD_DIM], values[WARPS][MAX_HEAD_DIM], ps[WARPS][32], dss[WARPS][32];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = blockIdx.x * WARPS + warp;
  const int kv_head = blockIdx.y, group = heads / kv_heads;
  if (row >= tokens) return;
  const size_t kv_offset = ((size_t)row * kv_heads + kv_head) * head_dim, stride = (size_t)heads * head_dim;
  load_row(keys[warp], k + kv_offset, head_dim, lane);
  load_row(values[warp], v + kv_offset, head_dim, lane);
  __syncwarp();
  const int last = Documents{starts, documents, window}.last_query(row);
  float dk_acc[PARTS] = {}, dv_acc[PARTS] = {};
  for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
    for (int base = row; base <= last; base += 32) {
      const int tile = last + 1 - base < 32 ? last + 1 - base : 32;
      const size_t q_offset = base * stride + head * head_dim, query = (size_t)head * tokens + base + lane;
      float p = 0.f, ds = 0.f;
      if (lane < tile) {
        p = expf(dot_row(keys[warp], q + q_offset + lane * stride, head_dim) * scale - lse[query]);
        ds = p * (dot_row(values[warp], d_o + q_offset + lane * stride, head_dim) - delta[query]);
      }
      ps[warp][lane] = p;
      dss[warp][lane] = ds;
      __syncwarp();
      add_rows(dv_acc, ps[warp], d_o + q_offset, stride, tile, head_dim, lane);
      add_rows(dk_acc, dss[warp], q + q_offset, stride, tile, head_dim, lane);
      __syncwarp();
    }
  }
  store_parts(dk + kv_offset, dk_acc, scale, head_dim, lane);
  store_parts(dv + kv_offset, dv_acc, 1.f, head_dim, lane);
}
EXPORT(attention_backward_key_baseline_bf16)

// A chunk of a span's keys a block, four heads. One chunk in all: O itself; more: the undivided sums [spans, heads,
// chunks, head_dim] and (row_max, row_sum) [spans, heads, chunks].
// grid: spans × ceil(heads / 4) × chunks, block: 128, no dynamic shared memory
extern "C" __global__ void __launch_bounds__(128)
    attention_decode_baseline_bf16(const bf16* __restrict__ q, const bf16* __restrict__ k, const bf16* __restrict__ v,
                                   bf16* __restrict__ o, float* __restrict__ partial, float2* __restrict__ stats,
                                   const uint32_t* __restrict__ spans, int heads, int kv_heads, int head_dim,
                                   float scale, uint32_t window) {
  __shared__ float queries[WARPS][MAX_HEAD_DIM], weights[WARPS][32];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, head = blockIdx.y * WARPS + warp;
  if (head >= heads) return;
  const Chunk chunk(spans + 2 * blockIdx.x, window, blockIdx.z);
  if (chunk.count <= 0 && gridDim.z > 1) return;
  const size_t row = (size_t)blockIdx.x * heads + head, stride = (size_t)kv_heads * head_dim;
  const size_t kv_offset = chunk.first * stride + head / (heads / kv_heads) * head_dim;
  load_row(queries[warp], q + row * head_dim, head_dim, lane);
  __syncwarp();
  float sums[PARTS], row_max, row_sum;
  attend(queries[warp], weights[warp], k + kv_offset, v + kv_offset, stride, chunk.count, head_dim, scale * LOG2E,
         lane, sums, row_max, row_sum);
  if (gridDim.z == 1) {
    store_parts(o + row * head_dim, sums, row_sum > 0.f ? 1.f / row_sum : 0.f, head_dim, lane);
    return;
  }
  const size_t part = row * gridDim.z + blockIdx.z;
  for (int i = 0; i < PARTS; i++) {
    if (i * 32 + lane < head_dim) partial[part * head_dim + i * 32 + lane] = sums[i];
  }
  if (lane == 0) stats[part] = make_float2(row_max, row_sum);
}
EXPORT(attention_decode_baseline_bf16)

// O of all chunks of a span, added in their order: Σ 2^(row_maxᵢ − row_max)·sumsᵢ / Σ 2^(row_maxᵢ − row_max)·row_sumᵢ.
// grid: spans × heads, block: 128, no dynamic shared memory
extern "C" __global__ void __launch_bounds__(128)
    attention_decode_combine_bf16(const float* __restrict__ partial, const float2* __restrict__ stats,
                                  const uint32_t* __restrict__ spans, bf16* __restrict__ o, int chunks, int head_dim,
                                  uint32_t window) {
  const int used = Chunk(spans + 2 * blockIdx.x, window, 0).chunks();
  const size_t row = (size_t)blockIdx.x * gridDim.y + blockIdx.y;
  stats += row * chunks;
  partial += row * chunks * head_dim;
  float row_max = -INFINITY;
  for (int i = threadIdx.x; i < used; i += 128) row_max = fmaxf(row_max, stats[i].x);
  row_max = block_max<128>(row_max);
  for (int d = threadIdx.x; d < head_dim; d += 128) {
    float sum = 0.f, row_sum = 0.f;
#pragma unroll 4
    for (int i = 0; i < used; i++) {
      const float2 stat = stats[i];
      const float weight = exp2_approx(stat.x - row_max);
      sum = fmaf(weight, partial[(size_t)i * head_dim + d], sum);
      row_sum = fmaf(weight, stat.y, row_sum);
    }
    o[row * head_dim + d] = __float2bfloat16(sum * (row_sum > 0.f ? 1.f / row_sum : 0.f));
  }
}
EXPORT(attention_decode_combine_bf16)
