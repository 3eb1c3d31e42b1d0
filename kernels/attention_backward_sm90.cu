// Gradients of attention for Hopper, by bulk tensor copies (TMA) and warpgroup products (wgmma): the two kernels of
// attention_flash_backward.cu, from the same tensors, with the same rounding; its reduce kernel adds the parts of dK
// and dV. Q, K, V, dO aligned to 16 bytes; head_dim 64 or 128.
//
//   kernel                                      bytes                 FLOPs            time
//   attention_backward_key_wgmma_hd*_bf16       Q, dO, K, V, dK, dV   8·d a seen pair  1.20 ms
//   attention_backward_query_wgmma_hd*_bf16     Q, dO, K, V, dQ       6·d a seen pair  0.90 ms
// Times are of 8192 tokens of one document, 28/4 heads of 128 (Qwen2.5-7B), at 800 TFLOP/s.
//
// A block holds 128 rows of two tensors, 64 a consumer warpgroup (K and V; Q and dO), and streams pairs of 64 rows of
// the other two, which one thread of the producer warpgroup keeps coming through a ring of four. Two more of its
// warps bring the key kernel lse and delta of a pair's queries.
// A consumer computes P while dP is under way, dS while dV is, and starts S of the next pair behind dK or dQ; the
// other's products run meanwhile. P and dS go from accumulators into A operands in registers, as the key kernel works
// on transposed scores. At head_dim 128 its threads hold dK, dV, S, dP and one operand in 64 + 64 + 32 + 32 + 16
// registers of 240, which is why pairs are of 64 rows, and dP of the next waits until dK is done.
//
// Rounds: P and dS to bf16 before the products with them, each result once. Sums are f32, over heads, then pairs, in
// ascending order, in a pair by the tensor core in ascending blocks of 16. Banks: the 128-byte swizzle of TMA and
// wgmma for operands, store_rows for results.
// Versions: wgmma wins where blocks of 128 queries reach all multiprocessors (wrapper); else those of
// attention_flash_backward.cu.
#include "prelude_sm90.cuh"

#include "attention_sm90.cuh"

// Rows of a block and of a consumer, rows of a streamed tile, pairs of the ring, warps of a consumer.
constexpr int ROWS = 128, HALF = 64, STEP = 64, STAGES = 4, WARPS = 4;

// Shared memory: the block's own two tiles in halves, the ring, lse and delta of its queries, the first key (last
// query) that each row sees (that sees it), barriers.
template <int HeadDim> struct SmemLayout {
  static constexpr int TILE_BYTES = 64 * HeadDim * 2, STATS = (4 + 2 * STAGES) * TILE_BYTES;
  static constexpr int BOUNDS = STATS + STAGES * 2 * STEP * 4, BARRIERS = BOUNDS + ROWS * 4;
  static constexpr int BYTES = BARRIERS + (2 * STAGES + 1) * 8;

  static __device__ __forceinline__ int own_offset(int tensor, int half) { return (2 * tensor + half) * TILE_BYTES; }
  static __device__ __forceinline__ unsigned char* own(int tensor, int half) {
    return dynamic_shared + own_offset(tensor, half);
  }
  static __device__ __forceinline__ unsigned char* streamed(uint32_t slot, int tensor) {
    return dynamic_shared + (4 + 2 * slot + tensor) * TILE_BYTES;
  }
  static __device__ __forceinline__ float* lse(uint32_t slot) {
    return reinterpret_cast<float*>(dynamic_shared + STATS) + slot * 2 * STEP;
  }
  static __device__ __forceinline__ float* delta(uint32_t slot) { return lse(slot) + STEP; }
  static __device__ __forceinline__ int* bounds() { return reinterpret_cast<int*>(dynamic_shared + BOUNDS); }
  static __device__ __forceinline__ uint64_t* full(uint32_t slot) {
    return reinterpret_cast<uint64_t*>(dynamic_shared + BARRIERS) + slot;
  }
  static __device__ __forceinline__ uint64_t* empty(uint32_t slot) { return full(STAGES + slot); }
  static __device__ __forceinline__ uint64_t* own_full() { return full(2 * STAGES); }
};

// ---- producer

// By one thread: makes the barriers, full after so many arrivals, and starts the copies of the block's own rows.
template <int HeadDim>
__device__ __forceinline__ void load_own(int arrivals, const CUtensorMap* first, const CUtensorMap* second, int column,
                                         int row) {
  using Smem = SmemLayout<HeadDim>;
  for (int i = 0; i < STAGES; i++) {
    mbarrier_init(Smem::full(i), arrivals);
    mbarrier_init(Smem::empty(i), 2 * WARPS);
  }
  mbarrier_init(Smem::own_full(), 1);
  mbarrier_fence_init();
  mbarrier_expect(Smem::own_full(), 4 * Smem::TILE_BYTES);
  for (int half = 0; half < 2; half++) {
    tma_load_tile<HeadDim, HALF>(Smem::own(0, half), first, Smem::own_full(), column, row + HALF * half);
    tma_load_tile<HeadDim, HALF>(Smem::own(1, half), second, Smem::own_full(), column, row + HALF * half);
  }
}

// By one thread: waits for the slot and starts the copies of a pair.
template <int HeadDim>
__device__ __forceinline__ void load_pair(const Ring<STAGES>& ring, const CUtensorMap* first, const CUtensorMap* second,
                                          int column, int row) {
  using Smem = SmemLayout<HeadDim>;
  uint64_t* const full = Smem::full(ring.slot);
  mbarrier_wait(Smem::empty(ring.slot), ring.parity ^ 1);
  mbarrier_expect(full, 2 * Smem::TILE_BYTES);
  tma_load_tile<HeadDim, STEP>(Smem::streamed(ring.slot, 0), first, full, column, row);
  tma_load_tile<HeadDim, STEP>(Smem::streamed(ring.slot, 1), second, full, column, row);
}

// By a warp: the same with lse or delta of a pair's queries, times a factor; behind the last of `rows`, zeros.
template <int HeadDim>
__device__ __forceinline__ void load_stat(const Ring<STAGES>& ring, float* to, const float* from, int rows,
                                          float factor) {
  using Smem = SmemLayout<HeadDim>;
  const int lane = threadIdx.x & 31;
  const float first = lane < rows ? from[lane] * factor : 0.f;
  const float second = lane + 32 < rows ? from[lane + 32] * factor : 0.f;
  mbarrier_wait(Smem::empty(ring.slot), ring.parity ^ 1);
  to[lane] = first;
  to[lane + 32] = second;
  mbarrier_arrive(Smem::full(ring.slot));
}

// The queries that see the block's keys, head by head. Loops that were unrolled would not do with the producer's
// registers.
template <int HeadDim>
__device__ __forceinline__ void produce_queries(const CUtensorMap* q, const CUtensorMap* d_o, const float* lse,
                                                const float* delta, const HeadRange& heads, int first_row, int q_tiles,
                                                int tokens) {
  using Smem = SmemLayout<HeadDim>;
  Ring<STAGES> ring;
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int head = heads.first; head < heads.first + heads.count; head++) {
#pragma unroll 1
      for (int tile = 0; tile < q_tiles; tile++, ring.next()) {
        load_pair<HeadDim>(ring, q, d_o, head * HeadDim, first_row + tile * STEP);
      }
    }
  } else if (warp == 1 || warp == 2) {
    const float* from = (warp == 1 ? lse : delta) + (size_t)heads.first * tokens + first_row;
    const float factor = warp == 1 ? LOG2E : 1.f;
    for (int head = 0; head < heads.count; head++, from += tokens) {
#pragma unroll 1
      for (int tile = 0; tile < q_tiles; tile++, ring.next()) {
        float* const to = warp == 1 ? Smem::lse(ring.slot) : Smem::delta(ring.slot);
        load_stat<HeadDim>(ring, to, from + tile * STEP, tokens - first_row - tile * STEP, factor);
      }
    }
  }
}

// The keys and values that the block's queries see.
template <int HeadDim>
__device__ __forceinline__ void produce_keys(const CUtensorMap* k, const CUtensorMap* v, int column, int kv_begin,
                                             int kv_end) {
  Ring<STAGES> ring;
  if (threadIdx.x != 0) return;
  for (int tile = kv_begin; tile < kv_end; tile++, ring.next()) load_pair<HeadDim>(ring, k, v, column, tile * STEP);
}

// ---- consumers

// What both consumers have: a warpgroup with 64 rows of the block.
template <int HeadDim> struct Consumer {
  using Smem = SmemLayout<HeadDim>;
  const int half = threadIdx.x / WARPGROUP - 1, warp = threadIdx.x / 32 - WARPS, lane = threadIdx.x & 31;
  const int warp_row, row;  // of the warp, of the lane's upper row
  const float scale;
  Ring<STAGES> ring;
  float p[STEP / 8][4], ds[STEP / 8][4];
  uint32_t operand[STEP / 16][4];

  __device__ __forceinline__ Consumer(int first_row, float scale)
      : warp_row(first_row + warp * 16), row(warp_row + (lane >> 2)), scale(scale) {}

  __device__ __forceinline__ void wait_full() const { mbarrier_wait(Smem::full(ring.slot), ring.parity); }
  // The warp is done with a pair, each lane with the lse and delta that it has read.
  __device__ __forceinline__ void release(uint32_t slot) const {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(Smem::empty(slot));
  }
  // Start S and dP, or their transposes, of the pair in the ring's slot.
  __device__ __forceinline__ void mma_s() {
    wgmma_ABt<HeadDim>(p, Smem::own(0, half), Smem::streamed(ring.slot, 0));
  }
  __device__ __forceinline__ void mma_dp() {
    wgmma_ABt<HeadDim>(ds, Smem::own(1, half), Smem::streamed(ring.slot, 1));
  }
  // Gradients pass through the places of the warpgroup's own rows, which its four warps have read.
  __device__ __forceinline__ void wait_own_read() const { named_barrier(1 + half, WARPGROUP); }
  __device__ __forceinline__ void store(bf16* to, uint32_t stride, int rows, const float (&acc)[HeadDim / 8][4],
                                        float factor, int tensor) const {
    const int staging = Smem::own_offset(tensor, half) + warp % WARPS * 16 * HeadDim * 2;
    store_rows<HeadDim>(to, stride, rows, acc, factor, factor, staging, lane);
  }
};

// dK and dV of 64 keys.
template <int HeadDim> struct KeyConsumer : Consumer<HeadDim> {
  using Smem = SmemLayout<HeadDim>;
  using Base = Consumer<HeadDim>;
  using Base::ring, Base::p, Base::ds, Base::operand, Base::lane, Base::row, Base::warp, Base::warp_row, Base::scale;
  float dk_acc[HeadDim / 8][4], dv_acc[HeadDim / 8][4];

  using Base::Base;

  // Over `steps` query tiles, which begin with the block's own rows for each head and end with `last_of_all`.
  __device__ __forceinline__ void run(int first_row, int last_of_all, int steps) {
    // All rows of the warp are seen until the last query of its first.
    const int* const last_queries = Smem::bounds() + warp * 16;
    const int last[2] = {last_queries[lane >> 2], last_queries[(lane >> 2) + 8]}, all_until = last_queries[0];
    mbarrier_wait(Smem::own_full(), 0);
    this->wait_full();
    this->mma_s();
    this->mma_dp();
    int first_query = first_row;
    for (int step = 0;; step++) {
      const uint32_t slot = ring.slot;
      const float *const lse = Smem::lse(slot) + (lane & 3) * 2, *const delta = Smem::delta(slot) + (lane & 3) * 2;
      wgmma_wait<1>(flat(p));
      if (first_query < warp_row + 15 || first_query + STEP - 1 > all_until) {
        mask_queries(p, first_query + (lane & 3) * 2, row, last);
      }
      recompute_p(p, scale * LOG2E, [&](int n, int i) { return lse[n * 8 + (i & 1)]; });
      to_operands(operand, p);
      wgmma_AB<HeadDim>(dv_acc, operand, Smem::streamed(slot, 1), step > 0);
      wgmma_wait<1>(flat(ds));
      softmax_backward(ds, p, [&](int n, int i) { return delta[n * 8 + (i & 1)]; });
      wgmma_wait<0>(flat(dv_acc));
      to_operands(operand, ds);
      wgmma_AB<HeadDim>(dk_acc, operand, Smem::streamed(slot, 0), step > 0);
      if (step + 1 == steps) break;
      ring.next();
      this->wait_full();
      this->mma_s();
      wgmma_wait<1>(flat(dk_acc));
      this->release(slot);
      this->mma_dp();
      first_query = first_query + STEP > last_of_all ? first_row : first_query + STEP;
    }
    wgmma_wait<0>(flat(dk_acc));
  }

  __device__ __forceinline__ void finish(bf16* dk, bf16* dv, float* partial, const HeadRange& heads, int parts,
                                         int tokens, int kv_heads) {
    const uint32_t stride = kv_heads * HeadDim, offset = warp_row * stride + heads.kv_head * HeadDim;
    const int rows = tokens - warp_row;
    this->wait_own_read();
    if (parts == 1) {
      this->store(dk + offset, stride, rows, dk_acc, scale, 0);
      this->store(dv + offset, stride, rows, dv_acc, 1.f, 1);
      return;
    }
    const size_t plane = (size_t)tokens * stride;
    float* const to = partial + heads.part * 2 * plane + offset;
    store_rows_f32<HeadDim>(to, stride, rows, dk_acc, scale, lane);
    store_rows_f32<HeadDim>(to + plane, stride, rows, dv_acc, 1.f, lane);
  }
};

// dQ of 64 queries of one head.
template <int HeadDim> struct QueryConsumer : Consumer<HeadDim> {
  using Smem = SmemLayout<HeadDim>;
  using Base = Consumer<HeadDim>;
  using Base::ring, Base::p, Base::ds, Base::operand, Base::lane, Base::row, Base::warp, Base::warp_row, Base::scale;
  float dq_acc[HeadDim / 8][4];

  using Base::Base;

  // `lse` and `delta` are those of the head.
  __device__ __forceinline__ void run(const float* lse, const float* delta, int tokens, int kv_begin, int kv_end) {
    // All rows of the warp see from the first key of its last on.
    const int* const first_keys = Smem::bounds() + warp * 16;
    const int first[2] = {first_keys[lane >> 2], first_keys[(lane >> 2) + 8]}, all_from = first_keys[15];
    float row_lse[2], row_delta[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const bool inside = row + i * 8 < tokens;
      row_lse[i] = inside ? lse[row + i * 8] * LOG2E : 0.f;
      row_delta[i] = inside ? delta[row + i * 8] : 0.f;
    }
    mbarrier_wait(Smem::own_full(), 0);
    this->wait_full();
    this->mma_s();
    this->mma_dp();
    for (int tile = kv_begin;; tile++) {
      const uint32_t slot = ring.slot;
      const int key = tile * STEP;
      wgmma_wait<1>(flat(p));
      if (key < all_from || key + STEP - 1 > warp_row) mask_keys(p, key + (lane & 3) * 2, row, first);
      recompute_p(p, scale * LOG2E, [&](int, int i) { return row_lse[i >> 1]; });
      // Here, because the compiler moves the wait for dP up to a branch, but not beyond it: the exponentials come
      // before.
      ring.next();
      if (tile + 1 < kv_end) this->wait_full();
      wgmma_wait<0>(flat(ds));
      softmax_backward(ds, p, [&](int, int i) { return row_delta[i >> 1]; });
      to_operands(operand, ds);
      wgmma_AB<HeadDim>(dq_acc, operand, Smem::streamed(slot, 0), tile > kv_begin);
      if (tile + 1 == kv_end) break;
      this->mma_s();
      wgmma_wait<1>(flat(dq_acc));
      this->release(slot);
      this->mma_dp();
    }
    wgmma_wait<0>(flat(dq_acc));
  }

  __device__ __forceinline__ void finish(bf16* dq, int head, int tokens, int heads) {
    const uint32_t stride = heads * HeadDim;
    this->wait_own_read();
    this->store(dq + (uint32_t)warp_row * stride + head * HeadDim, stride, tokens - warp_row, dq_acc, scale, 0);
  }
};

// ---- kernels

template <int HeadDim>
__device__ __forceinline__ void wgmma_backward_key(const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v,
                                                   const CUtensorMap* d_o, const float* __restrict__ lse,
                                                   const float* __restrict__ delta, bf16* __restrict__ dk,
                                                   bf16* __restrict__ dv, float* __restrict__ partial,
                                                   Documents documents, int tokens, int heads, int kv_heads, int parts,
                                                   float scale) {
  const HeadRange range(blockIdx.x, parts, heads, kv_heads);
  const int first_row = blockIdx.y * ROWS, last_row = (tokens - first_row < ROWS ? tokens : first_row + ROWS) - 1;
  int* const last_queries = SmemLayout<HeadDim>::bounds();
  // A pair is full with its copies and the two warps of lse and delta.
  if (threadIdx.x == 0) load_own<HeadDim>(1 + 2 * 32, k, v, range.kv_head * HeadDim, first_row);
  if (threadIdx.x / 32 == 1) documents.find_last_queries<ROWS>(last_queries, first_row, last_row);
  __syncthreads();
  const int last_of_all = last_queries[ROWS - 1], q_tiles = last_of_all / STEP + 1 - first_row / STEP;
  if (threadIdx.x < WARPGROUP) {
    registers_decrease<24>();
    produce_queries<HeadDim>(q, d_o, lse, delta, range, first_row, q_tiles, tokens);
    return;
  }
  registers_increase<240>();
  KeyConsumer<HeadDim> consumer(first_row, scale);
  consumer.run(first_row, last_of_all, range.count * q_tiles);
  consumer.finish(dk, dv, partial, range, parts, tokens, kv_heads);
}

template <int HeadDim>
__device__ __forceinline__ void wgmma_backward_query(const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v,
                                                     const CUtensorMap* d_o, const float* __restrict__ lse,
                                                     const float* __restrict__ delta, bf16* __restrict__ dq,
                                                     Documents documents, int tokens, int heads, int kv_heads,
                                                     float scale) {
  const int head = blockIdx.x, first_row = (gridDim.y - 1 - blockIdx.y) * ROWS;
  const int last_row = (tokens - first_row < ROWS ? tokens : first_row + ROWS) - 1;
  int* const first_keys = SmemLayout<HeadDim>::bounds();
  if (threadIdx.x == 0) load_own<HeadDim>(1, q, d_o, head * HeadDim, first_row);
  if (threadIdx.x / 32 == 1) documents.find_first_keys<ROWS>(first_keys, first_row, last_row);
  __syncthreads();
  const int kv_begin = first_keys[0] / STEP, kv_end = last_row / STEP + 1;
  if (threadIdx.x < WARPGROUP) {
    registers_decrease<24>();
    produce_keys<HeadDim>(k, v, head / (heads / kv_heads) * HeadDim, kv_begin, kv_end);
    return;
  }
  registers_increase<240>();
  QueryConsumer<HeadDim> consumer(first_row, scale);
  const size_t row = (size_t)head * tokens;
  consumer.run(lse + row, delta + row, tokens, kv_begin, kv_end);
  consumer.finish(dq, head, tokens, heads);
}

#define WGMMA_BACKWARD(key_name, query_name, head_dim)                                                                 \
  extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1)                                                       \
      key_name(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,                           \
               const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap d_o,                         \
               const float* __restrict__ lse, const float* __restrict__ delta, bf16* __restrict__ dk,                  \
               bf16* __restrict__ dv, float* __restrict__ partial, const uint32_t* __restrict__ starts, int documents, \
               int tokens, int heads, int kv_heads, int parts, float scale, uint32_t window) {                         \
    const Documents packed{starts, documents, window};                                                                 \
    wgmma_backward_key<head_dim>(&q, &k, &v, &d_o, lse, delta, dk, dv, partial, packed, tokens, heads, kv_heads,       \
                                 parts, scale);                                                                        \
  }                                                                                                                    \
  EXPORT(key_name)                                                                                                     \
  SHARED_BYTES(key_name, SmemLayout<head_dim>::BYTES)                                                                  \
  extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1)                                                       \
      query_name(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,                         \
                 const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap d_o,                       \
                 const float* __restrict__ lse, const float* __restrict__ delta, bf16* __restrict__ dq,                \
                 const uint32_t* __restrict__ starts, int documents, int tokens, int heads, int kv_heads, float scale, \
                 uint32_t window) {                                                                                    \
    const Documents packed{starts, documents, window};                                                                 \
    wgmma_backward_query<head_dim>(&q, &k, &v, &d_o, lse, delta, dq, packed, tokens, heads, kv_heads, scale);          \
  }                                                                                                                    \
  EXPORT(query_name)                                                                                                   \
  SHARED_BYTES(query_name, SmemLayout<head_dim>::BYTES)

// key: grid kv_heads · parts × ceil(tokens / 128); query: grid heads × ceil(tokens / 128); block: 384, shared:
// 1536·head_dim + 2632 bytes; boxes of all are 64 rows of 64 columns
WGMMA_BACKWARD(attention_backward_key_wgmma_hd64_bf16, attention_backward_query_wgmma_hd64_bf16, 64)
WGMMA_BACKWARD(attention_backward_key_wgmma_hd128_bf16, attention_backward_query_wgmma_hd128_bf16, 128)
