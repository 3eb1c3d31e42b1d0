// Gradients of attention for Hopper, by bulk tensor copies (TMA) and warpgroup products (wgmma): the two kernels of
// attention_flash_backward.cu, from the same tensors, with the same sums and rounding; its reduce kernel adds the parts of dK and dV.
// Q, K, V, dO aligned to 16 bytes; head_dim 64 or 128.
//
//   kernel                                      bytes                 FLOPs            8192 tokens, 28/4 heads of 128, 800 TFLOP/s
//   attention_backward_key_wgmma_hd*_bf16       Q, dO, K, V, dK, dV   8·d a seen pair  1.20 ms
//   attention_backward_query_wgmma_hd*_bf16     Q, dO, K, V, dQ       6·d a seen pair  0.90 ms
//
// A block owns 128 rows of two tensors, 64 a warpgroup (K and V; Q and dO), and streams pairs of 64 rows of the other two, which one thread
// of the first warpgroup keeps coming through a ring of four. Two more of its warps bring the key kernel lse and D of a pair's queries.
// A warpgroup computes P while dP is under way, dS while dV is, and starts S of the next pair behind dK or dQ; the other's products run
// meanwhile. P and dS go from sums into A operands in registers, as the key kernel works on transposed scores. At head_dim 128 its threads
// hold dK, dV, S, dP and one operand in 64 + 64 + 32 + 32 + 16 registers of 240, which is why pairs are of 64 rows, and dP of the next
// waits until dK is done.
//
// Rounds: P and dS to bf16 before the products with them, each result once. Sums are f32, over heads, then pairs, in ascending order, in a
// pair by the tensor core in ascending blocks of 16. Banks: the 128-byte swizzle of TMA and wgmma for operands, store_rows for results.
// Versions: wgmma wins where blocks of 128 queries reach all multiprocessors (wrapper); else those of attention_flash_backward.cu.
#include "prelude_sm90.cuh"

#include "attention_sm90.cuh"

// Rows of a block, rows of a streamed tile, pairs of the ring.
constexpr int ROWS = 128, STEP = 64, STAGES = 4;

// What is where in shared memory: two own tiles in halves, the ring, two numbers a query of the ring, barriers.
template <int HeadDim> struct Places {
  static constexpr int TILE = 64 * HeadDim * 2, NUMBERS = (4 + 2 * STAGES) * TILE;
  static constexpr int BYTES = NUMBERS + STAGES * 2 * STEP * 4 + (2 * STAGES + 1) * 8;

  __device__ __forceinline__ int own(int tensor, int half) const { return (2 * tensor + half) * TILE; }
  __device__ __forceinline__ unsigned char* pair(uint32_t slot, int tensor) const {
    return dynamic_shared + (4 + 2 * slot + tensor) * TILE;
  }
  __device__ __forceinline__ float* numbers(uint32_t slot) const {
    return reinterpret_cast<float*>(dynamic_shared + NUMBERS) + slot * 2 * STEP;
  }
  __device__ __forceinline__ uint64_t* full(uint32_t slot) const {
    return reinterpret_cast<uint64_t*>(dynamic_shared + NUMBERS + STAGES * 2 * STEP * 4) + slot;
  }
  __device__ __forceinline__ uint64_t* empty(uint32_t slot) const { return full(STAGES + slot); }
  __device__ __forceinline__ uint64_t* own_full() const { return full(2 * STAGES); }

  // By one thread: makes the barriers, full after so many arrivals, and starts the copies of the block's own rows.
  __device__ __forceinline__ void open(int arrivals, const CUtensorMap* first, const CUtensorMap* second, int column, int row) const {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(full(i), arrivals);
      mbarrier_init(empty(i), 8);
    }
    mbarrier_init(own_full(), 1);
    mbarrier_fence_init();
    mbarrier_expect(own_full(), 4 * TILE);
    for (int half = 0; half < 2; half++) {
      load_tile<HeadDim, 64>(dynamic_shared + own(0, half), first, own_full(), column, row + 64 * half);
      load_tile<HeadDim, 64>(dynamic_shared + own(1, half), second, own_full(), column, row + 64 * half);
    }
  }
  // By one thread: waits for the slot and starts the copies of a pair.
  __device__ __forceinline__ void fill(const Ring<STAGES>& ring, const CUtensorMap* first, const CUtensorMap* second, int column,
                                       int row) const {
    uint64_t* const barrier = full(ring.slot);
    mbarrier_wait(empty(ring.slot), ring.parity ^ 1);
    mbarrier_expect(barrier, 2 * TILE);
    load_tile<HeadDim, 64>(pair(ring.slot, 0), first, barrier, column, row);
    load_tile<HeadDim, 64>(pair(ring.slot, 1), second, barrier, column, row);
  }
  // By a warp: the same with one of the numbers, times a factor; behind the last of `rows`, zeros.
  __device__ __forceinline__ void fill_numbers(const Ring<STAGES>& ring, int which, const float* from, int rows, float factor) const {
    const int lane = threadIdx.x & 31;
    const float first = lane < rows ? from[lane] * factor : 0.f, second = lane + 32 < rows ? from[lane + 32] * factor : 0.f;
    float* const to = numbers(ring.slot) + which * STEP + lane;
    mbarrier_wait(empty(ring.slot), ring.parity ^ 1);
    to[0] = first;
    to[32] = second;
    mbarrier_arrive(full(ring.slot));
  }
};

template <int HeadDim>
__device__ __forceinline__ void wgmma_backward_key(const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v, const CUtensorMap* d_o,
                                                   const float* __restrict__ lse, const float* __restrict__ delta, bf16* __restrict__ dk,
                                                   bf16* __restrict__ dv, float* __restrict__ partial, Documents documents, int tokens,
                                                   int heads, int kv_heads, int parts, float scale) {
  constexpr Places<HeadDim> places;
  const int kv_head = blockIdx.x / parts, part = blockIdx.x % parts, group = heads / kv_heads, share = (group + parts - 1) / parts;
  const int first_head = kv_head * group + part * share;
  const int heads_here = group - part * share < share ? group - part * share : share;
  const int warpgroup = threadIdx.x / WARPGROUP, lane = threadIdx.x & 31, first_row = blockIdx.y * ROWS;
  const int last_row = (tokens - first_row < ROWS ? tokens : first_row + ROWS) - 1;
  if (threadIdx.x == 0) places.open(65, k, v, kv_head * HeadDim, first_row);
  const int last_of_all = documents.last_query(last_row), tiles = last_of_all / STEP + 1 - first_row / STEP;
  const int items = heads_here * tiles;
  __syncthreads();

  Ring<STAGES> ring;
  if (warpgroup == 0) {
    // Loops that were unrolled would not do with these registers.
    registers_decrease<24>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
      for (int head = first_head; head < first_head + heads_here; head++) {
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++, ring.next()) places.fill(ring, q, d_o, head * HeadDim, first_row + tile * STEP);
      }
    } else if (warp == 1 || warp == 2) {
      const float* from = (warp == 1 ? lse : delta) + (size_t)first_head * tokens + first_row;
      const float factor = warp == 1 ? LOG2E : 1.f;
      for (int head = 0; head < heads_here; head++, from += tokens) {
#pragma unroll 1
        for (int tile = 0; tile < tiles; tile++, ring.next()) {
          places.fill_numbers(ring, warp - 1, from + tile * STEP, tokens - first_row - tile * STEP, factor);
        }
      }
    }
    return;
  }

  registers_increase<240>();
  const int half = warpgroup - 1, warp = threadIdx.x / 32 - 4, warp_row = first_row + warp * 16, row = warp_row + (lane >> 2);
  const auto last_query = [&](int row) { return documents.last_query(row < last_row ? row : last_row); };
  // All rows of the warp are seen until the last query of its first.
  const int last[2] = {last_query(row), last_query(row + 8)}, all_until = last_query(warp_row);
  const unsigned char *const own_k = dynamic_shared + places.own(0, half), *const own_v = dynamic_shared + places.own(1, half);
  const float scale_log2 = scale * LOG2E;
  float p[STEP / 8][4], ds[STEP / 8][4], dks[HeadDim / 8][4], dvs[HeadDim / 8][4];
  uint32_t weights[STEP / 16][4];
  mbarrier_wait(places.own_full(), 0);
  mbarrier_wait(places.full(0), 0);
  start_transposed<HeadDim>(p, own_k, places.pair(0, 0));
  start_transposed<HeadDim>(ds, own_v, places.pair(0, 1));
  int first_query = first_row;
  for (int item = 0;; item++) {
    const uint32_t slot = ring.slot;
    const float* const numbers = places.numbers(slot) + (lane & 3) * 2;
    wgmma_wait<1>(flat(p));
    if (first_query < warp_row + 15 || first_query + STEP - 1 > all_until) hide_queries(p, first_query + (lane & 3) * 2, row, last);
#pragma unroll
    for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) p[n][i] = exp2_approx(p[n][i] * scale_log2 - numbers[n * 8 + (i & 1)]);
    }
    round_weights(weights, p);
    start_weights<HeadDim>(dvs, weights, places.pair(slot, 1), item > 0);
    wgmma_wait<1>(flat(ds));
#pragma unroll
    for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) ds[n][i] = p[n][i] * (ds[n][i] - numbers[STEP + n * 8 + (i & 1)]);
    }
    wgmma_wait<0>(flat(dvs));
    round_weights(weights, ds);
    start_weights<HeadDim>(dks, weights, places.pair(slot, 0), item > 0);
    if (item + 1 == items) break;
    ring.next();
    mbarrier_wait(places.full(ring.slot), ring.parity);
    start_transposed<HeadDim>(p, own_k, places.pair(ring.slot, 0));
    wgmma_wait<1>(flat(dks));
    if (lane == 0) mbarrier_arrive(places.empty(slot));
    start_transposed<HeadDim>(ds, own_v, places.pair(ring.slot, 1));
    first_query = first_query + STEP > last_of_all ? first_row : first_query + STEP;
  }
  wgmma_wait<0>(flat(dks));

  // Gradients pass through the places of the warpgroup's own rows, which its four warps have read.
  named_barrier(1 + half, WARPGROUP);
  const uint32_t stride = kv_heads * HeadDim, at = warp_row * stride + kv_head * HeadDim;
  const int rows = tokens - warp_row, within = warp % 4 * 16 * HeadDim * 2;
  if (parts == 1) {
    store_rows<HeadDim>(dk + at, stride, rows, dks, scale, scale, places.own(0, half) + within, lane);
    store_rows<HeadDim>(dv + at, stride, rows, dvs, 1.f, 1.f, places.own(1, half) + within, lane);
    return;
  }
  const size_t plane = (size_t)tokens * stride;
  float* const to = partial + part * 2 * plane + at;
  store_floats<HeadDim>(to, stride, rows, dks, scale, lane);
  store_floats<HeadDim>(to + plane, stride, rows, dvs, 1.f, lane);
}

template <int HeadDim>
__device__ __forceinline__ void wgmma_backward_query(const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v,
                                                     const CUtensorMap* d_o, const float* __restrict__ lse,
                                                     const float* __restrict__ delta, bf16* __restrict__ dq, Documents documents,
                                                     int tokens, int heads, int kv_heads, float scale) {
  constexpr Places<HeadDim> places;
  const int head = blockIdx.x, first_row = (gridDim.y - 1 - blockIdx.y) * ROWS;
  const int warpgroup = threadIdx.x / WARPGROUP, lane = threadIdx.x & 31;
  const int last_row = (tokens - first_row < ROWS ? tokens : first_row + ROWS) - 1;
  if (threadIdx.x == 0) places.open(1, q, d_o, head * HeadDim, first_row);
  const int first_tile = documents.first_key(first_row) / STEP, tiles = last_row / STEP + 1;
  __syncthreads();

  Ring<STAGES> ring;
  if (warpgroup == 0) {
    registers_decrease<24>();
    if (threadIdx.x == 0) {
      const int column = head / (heads / kv_heads) * HeadDim;
      for (int tile = first_tile; tile < tiles; tile++, ring.next()) places.fill(ring, k, v, column, tile * STEP);
    }
    return;
  }

  registers_increase<240>();
  const int half = warpgroup - 1, warp = threadIdx.x / 32 - 4, warp_row = first_row + warp * 16, row = warp_row + (lane >> 2);
  const auto first_key = [&](int row) { return documents.first_key(row < last_row ? row : last_row); };
  // All rows of the warp see from the first key of its last on.
  const int first[2] = {first_key(row), first_key(row + 8)}, all_from = first_key(warp_row + 15);
  float row_lse[2], row_delta[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const bool inside = row + i * 8 < tokens;
    const size_t at = (size_t)head * tokens + row + i * 8;
    row_lse[i] = inside ? lse[at] * LOG2E : 0.f;
    row_delta[i] = inside ? delta[at] : 0.f;
  }
  const unsigned char *const own_q = dynamic_shared + places.own(0, half), *const own_do = dynamic_shared + places.own(1, half);
  const float scale_log2 = scale * LOG2E;
  float p[STEP / 8][4], ds[STEP / 8][4], dqs[HeadDim / 8][4];
  uint32_t weights[STEP / 16][4];
  mbarrier_wait(places.own_full(), 0);
  mbarrier_wait(places.full(0), 0);
  start_transposed<HeadDim>(p, own_q, places.pair(0, 0));
  start_transposed<HeadDim>(ds, own_do, places.pair(0, 1));
  for (int tile = first_tile;; tile++) {
    const uint32_t slot = ring.slot;
    const int key = tile * STEP;
    wgmma_wait<1>(flat(p));
    if (key < all_from || key + STEP - 1 > warp_row) hide_keys(p, key + (lane & 3) * 2, row, first);
#pragma unroll
    for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) p[n][i] = exp2_approx(p[n][i] * scale_log2 - row_lse[i >> 1]);
    }
    // Here, because the compiler moves the wait for dP up to a branch, but not beyond it: the exponentials come before.
    ring.next();
    if (tile + 1 < tiles) mbarrier_wait(places.full(ring.slot), ring.parity);
    wgmma_wait<0>(flat(ds));
#pragma unroll
    for (int n = 0; n < STEP / 8; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) ds[n][i] = p[n][i] * (ds[n][i] - row_delta[i >> 1]);
    }
    round_weights(weights, ds);
    start_weights<HeadDim>(dqs, weights, places.pair(slot, 0), tile > first_tile);
    if (tile + 1 == tiles) break;
    start_transposed<HeadDim>(p, own_q, places.pair(ring.slot, 0));
    wgmma_wait<1>(flat(dqs));
    if (lane == 0) mbarrier_arrive(places.empty(slot));
    start_transposed<HeadDim>(ds, own_do, places.pair(ring.slot, 1));
  }
  wgmma_wait<0>(flat(dqs));

  // As in the other kernel.
  named_barrier(1 + half, WARPGROUP);
  const uint32_t stride = heads * HeadDim;
  bf16* const to = dq + (uint32_t)warp_row * stride + head * HeadDim;
  store_rows<HeadDim>(to, stride, tokens - warp_row, dqs, scale, scale, places.own(0, half) + warp % 4 * 16 * HeadDim * 2, lane);
}

#define WGMMA_BACKWARD(key_name, query_name, head_dim)                                                                                    \
  extern "C" __global__ void __launch_bounds__(384, 1)                                                                                    \
      key_name(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,       \
               const __grid_constant__ CUtensorMap d_o, const float* __restrict__ lse, const float* __restrict__ delta,                   \
               bf16* __restrict__ dk, bf16* __restrict__ dv, float* __restrict__ partial, const uint32_t* __restrict__ starts,            \
               int documents, int tokens, int heads, int kv_heads, int parts, float scale, uint32_t window) {                             \
    wgmma_backward_key<head_dim>(&q, &k, &v, &d_o, lse, delta, dk, dv, partial, Documents{starts, documents, window}, tokens, heads,      \
                                 kv_heads, parts, scale);                                                                                 \
  }                                                                                                                                       \
  EXPORT(key_name)                                                                                                                        \
  SHARED_BYTES(key_name, Places<head_dim>::BYTES)                                                                                         \
  extern "C" __global__ void __launch_bounds__(384, 1)                                                                                    \
      query_name(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,     \
                 const __grid_constant__ CUtensorMap d_o, const float* __restrict__ lse, const float* __restrict__ delta,                 \
                 bf16* __restrict__ dq, const uint32_t* __restrict__ starts, int documents, int tokens, int heads, int kv_heads,          \
                 float scale, uint32_t window) {                                                                                          \
    wgmma_backward_query<head_dim>(&q, &k, &v, &d_o, lse, delta, dq, Documents{starts, documents, window}, tokens, heads, kv_heads,       \
                                   scale);                                                                                                \
  }                                                                                                                                       \
  EXPORT(query_name)                                                                                                                      \
  SHARED_BYTES(query_name, Places<head_dim>::BYTES)

// key: grid kv_heads · parts × ceil(tokens / 128); query: grid heads × ceil(tokens / 128); block: 384, shared: 1536·head_dim + 2120 bytes;
// boxes of all are 64 rows of 64 columns
WGMMA_BACKWARD(attention_backward_key_wgmma_hd64_bf16, attention_backward_query_wgmma_hd64_bf16, 64)
WGMMA_BACKWARD(attention_backward_key_wgmma_hd128_bf16, attention_backward_query_wgmma_hd128_bf16, 128)
