// Attention, forward, for Hopper (FlashAttention-3, arXiv 2407.08608), by bulk tensor copies (TMA) and warpgroup
// products (wgmma): what attention_flash.cu computes, from the same tensors. head_dim 64 or 128; scale > 0; Q, K, V,
// O aligned to 16 bytes.
//
//   kernel                             bytes            FLOPs            8192 tokens, 28/4 heads of 128, 800 TFLOP/s
//   attention_forward_wgmma_hd*_bf16   Q, K, V, O, lse  4·d a seen pair  0.60 ms (134 MB: 0.05 ms)
//
// A work tile is 128 queries of one head, which meet tiles of 128 keys and values. Blocks are persistent, one a
// multiprocessor, and take work tiles in turn (TileScheduler), those with the most keys first. Of the first warpgroup
// one warp finds which keys the next work tile sees; another is the producer, which brings its Q into one of two
// slots and its K and V into a ring of five tiles, a key tile ahead of the values: K0, K1, V0, K2, V1 … So the next
// work tile's Q, K0, K1 and V0 arrive while this one's last products and its O are under way. Two consumers,
// warpgroups of 64 queries each, take the tiles in this order, and leave O in the place of their queries, from which a
// warp each stores it by bulk copies while they go on.
// A consumer issues S = Q·Kᵀ of the next tile and O += P·V of this one together and computes the softmax of S while
// P·V is under way: P is the A operand in registers that a rounded S leaves. The two take turns in issuing, so that
// one has the tensor cores while the other is at its exponentials: 128 × 128 of these take 1024 clocks of a
// multiprocessor, their products 1024 (head_dim 64) or 2048.
// At head_dim 128 a thread holds S, P and O in 64 + 32 + 64 registers, and Q and the ring take all of shared memory:
// a block is alone on its multiprocessor, two warpgroups with 240 registers and one with 24.
// Which tiles are skipped or masked is as in attention_flash.cu.
//
// Rounds: P to bf16 before P·V (row_sum takes the unrounded), O once. Sums are f32, over keys in ascending tiles, in
// a tile by the tensor core in ascending blocks of 16: results do not depend on the launch. Banks: the 128-byte
// swizzle of TMA and wgmma for operands and O.
// Versions: wgmma wins where its blocks reach all multiprocessors (wrapper); else those of attention_flash.cu, whose
// blocks are smaller.
#include "prelude_sm90.cuh"

#include "attention_sm90.cuh"

// Rows of a tile, tiles of the ring, slots of Q, rows and warps of a consumer.
constexpr int ROWS = 128, STAGES = 5, Q_STAGES = 2, HALF = 64, WARPS = 4;

// Shared memory: slots of Q in halves of 64 rows, the ring of K and V, the first key that each query of a slot sees,
// barriers.
template <int HeadDim> struct SmemLayout {
  static constexpr int TILE_BYTES = ROWS * HeadDim * 2;
  static constexpr int FIRST_KEYS = (Q_STAGES + STAGES) * TILE_BYTES, BARRIERS = FIRST_KEYS + Q_STAGES * ROWS * 4;
  static constexpr int BYTES = BARRIERS + (2 * STAGES + 5 * Q_STAGES) * 8;

  static __device__ __forceinline__ unsigned char* q(uint32_t slot, int half) {
    return dynamic_shared + (2 * slot + half) * (TILE_BYTES / 2);
  }
  static __device__ __forceinline__ unsigned char* kv(uint32_t slot) {
    return dynamic_shared + (Q_STAGES + slot) * TILE_BYTES;
  }
  static __device__ __forceinline__ int* first_keys(uint32_t slot) {
    return reinterpret_cast<int*>(dynamic_shared + FIRST_KEYS) + slot * ROWS;
  }
  static __device__ __forceinline__ uint64_t* full(uint32_t slot) {
    return reinterpret_cast<uint64_t*>(dynamic_shared + BARRIERS) + slot;
  }
  static __device__ __forceinline__ uint64_t* empty(uint32_t slot) { return full(STAGES + slot); }
  static __device__ __forceinline__ uint64_t* q_full(uint32_t slot) { return full(2 * STAGES + slot); }
  static __device__ __forceinline__ uint64_t* q_empty(uint32_t slot) { return q_full(Q_STAGES + slot); }
  static __device__ __forceinline__ uint64_t* keys_found(uint32_t slot) { return q_empty(Q_STAGES + slot); }
  // O takes the place of Q.
  static __device__ __forceinline__ uint64_t* o_full(uint32_t slot, int half) {
    return keys_found(Q_STAGES + 2 * slot + half);
  }
};

// A work tile, and how far its keys reach.
struct QTile {
  int head, kv_head, first_row, last_row;

  __device__ __forceinline__ int kv_begin(const int* first_keys) const { return first_keys[0] / ROWS; }
  __device__ __forceinline__ int kv_end() const { return last_row / ROWS + 1; }
};

// The work tiles of a block. All lie in one order: from the last rows, which see the most keys of a long document, to
// the first, heads of one tile of rows side by side, so that those of a group find K and V in L2. In each round the
// blocks take as many as they are, every second time in reverse: none has the longest of each.
struct TileScheduler {
  const int tokens, heads, kv_heads;
  int round = 0;

  __device__ __forceinline__ TileScheduler(int tokens, int heads, int kv_heads)
      : tokens(tokens), heads(heads), kv_heads(kv_heads) {}

  __device__ __forceinline__ int q_tiles() const { return (tokens + ROWS - 1) / ROWS; }
  __device__ __forceinline__ int index() const {
    const int blocks = gridDim.x, block = blockIdx.x;
    return round * blocks + (round & 1 ? blocks - 1 - block : block);
  }
  __device__ __forceinline__ bool valid() const { return index() < heads * q_tiles(); }
  __device__ __forceinline__ void next() { round++; }
  __device__ __forceinline__ QTile tile() const {
    const int head = index() % heads, first_row = (q_tiles() - 1 - index() / heads) * ROWS;
    return {head, head / (heads / kv_heads), first_row, (tokens - first_row < ROWS ? tokens : first_row + ROWS) - 1};
  }
};

template <int HeadDim> __device__ __forceinline__ void init_barriers() {
  using Smem = SmemLayout<HeadDim>;
  for (int i = 0; i < STAGES; i++) {
    mbarrier_init(Smem::full(i), 1);
    mbarrier_init(Smem::empty(i), 2 * WARPS);
  }
  for (int i = 0; i < Q_STAGES; i++) {
    mbarrier_init(Smem::q_full(i), 1);
    mbarrier_init(Smem::q_empty(i), 2);
    mbarrier_init(Smem::keys_found(i), 1);
    for (int half = 0; half < 2; half++) mbarrier_init(Smem::o_full(i, half), WARPS);
  }
  mbarrier_fence_init();
}

// By one warp: the first keys of the work tiles, a slot of Q each.
template <int HeadDim>
__device__ __forceinline__ void find_keys(const Documents& documents, TileScheduler scheduler) {
  using Smem = SmemLayout<HeadDim>;
  for (Ring<Q_STAGES> q_ring; scheduler.valid(); scheduler.next(), q_ring.next()) {
    const QTile tile = scheduler.tile();
    mbarrier_wait(Smem::q_empty(q_ring.slot), q_ring.parity ^ 1);
    documents.find_first_keys<ROWS>(Smem::first_keys(q_ring.slot), tile.first_row, tile.last_row);
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(Smem::keys_found(q_ring.slot));
  }
}

// By one thread. That keys are found says that the slot of Q is empty, too.
template <int HeadDim>
__device__ __forceinline__ void produce(const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v,
                                        TileScheduler scheduler) {
  using Smem = SmemLayout<HeadDim>;
  Ring<STAGES> ring;
  for (Ring<Q_STAGES> q_ring; scheduler.valid(); scheduler.next(), q_ring.next()) {
    const QTile tile = scheduler.tile();
    uint64_t* const q_full = Smem::q_full(q_ring.slot);
    mbarrier_wait(Smem::keys_found(q_ring.slot), q_ring.parity);
    mbarrier_expect(q_full, Smem::TILE_BYTES);
    for (int half = 0; half < 2; half++) {
      const int row = tile.first_row + HALF * half;
      tma_load_tile<HeadDim, HALF>(Smem::q(q_ring.slot, half), q, q_full, tile.head * HeadDim, row);
    }
    const auto load = [&](const CUtensorMap* map, int kv_tile) {
      uint64_t* const full = Smem::full(ring.slot);
      mbarrier_wait(Smem::empty(ring.slot), ring.parity ^ 1);
      mbarrier_expect(full, Smem::TILE_BYTES);
      tma_load_tile<HeadDim, ROWS>(Smem::kv(ring.slot), map, full, tile.kv_head * HeadDim, kv_tile * ROWS);
      ring.next();
    };
    const int kv_begin = tile.kv_begin(Smem::first_keys(q_ring.slot)), kv_end = tile.kv_end();
#pragma unroll 1
    for (int i = kv_begin; i <= kv_end; i++) {
      if (i < kv_end) load(k, i);
      if (i > kv_begin) load(v, i - 1);
    }
  }
}

// By one thread: stores O of the consumer `half` and releases its half of the slot.
template <int HeadDim>
__device__ __forceinline__ void store_o(const CUtensorMap* o, TileScheduler scheduler, int half) {
  using Smem = SmemLayout<HeadDim>;
  for (Ring<Q_STAGES> q_ring; scheduler.valid(); scheduler.next(), q_ring.next()) {
    const QTile tile = scheduler.tile();
    mbarrier_wait(Smem::o_full(q_ring.slot, half), q_ring.parity);
    for (int i = 0; i < HeadDim / 64; i++) {
      const unsigned char* const slab = Smem::q(q_ring.slot, half) + i * HALF * 128;
      tma_store_3d(o, slab, tile.head * HeadDim + i * 64, tile.first_row + HALF * half, 0);
    }
    tma_store_commit();
    tma_store_wait_read<0>();
    mbarrier_arrive(Smem::q_empty(q_ring.slot));
  }
}

// A warpgroup with 64 queries.
template <int HeadDim> struct Consumer {
  using Smem = SmemLayout<HeadDim>;
  const int half = threadIdx.x / WARPGROUP - 1, warp = threadIdx.x / 32 - WARPS, lane = threadIdx.x & 31;
  const float scale;
  Ring<STAGES> ring;
  Ring<Q_STAGES> q_ring;
  Softmax<1> softmax;
  float scores[ROWS / 8][4], o_acc[1][HeadDim / 8][4], factors[2];
  uint32_t p[ROWS / 16][4];
  // Of the lane's two rows, and of the last of the warp: all of these see from there on.
  int first[2], all_from, warp_row;

  __device__ __forceinline__ explicit Consumer(float scale) : scale(scale) {}

  // Both start a product with the next tile of the ring and return its slot.
  __device__ __forceinline__ uint32_t mma_qk() {
    const uint32_t slot = ring.slot;
    mbarrier_wait(Smem::full(slot), ring.parity);
    wgmma_ABt<HeadDim>(scores, Smem::q(q_ring.slot, half), Smem::kv(slot));
    ring.next();
    return slot;
  }
  __device__ __forceinline__ uint32_t mma_pv() {
    const uint32_t slot = ring.slot;
    mbarrier_wait(Smem::full(slot), ring.parity);
    wgmma_AB<HeadDim>(o_acc[0], p, Smem::kv(slot), true);
    ring.next();
    return slot;
  }
  // The warp is done with a tile of the ring.
  __device__ __forceinline__ void release(uint32_t slot) const {
    if (lane == 0) mbarrier_arrive(Smem::empty(slot));
  }
  // P, unrounded, from S, and the factors of what O holds so far.
  __device__ __forceinline__ void softmax_step(int kv_tile) {
    const int key = kv_tile * ROWS;
    if (key < all_from || key + ROWS - 1 > warp_row) {
      mask_keys(scores, key + (lane & 3) * 2, warp_row + (lane >> 2), first);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) factors[i] = softmax.exponentials(scores, 0, i, scale * LOG2E);
  }
  __device__ __forceinline__ void rescale_o() {
#pragma unroll
    for (int i = 0; i < 2; i++) rescale(o_acc[0], i, factors[i]);
  }

  // Barrier 1 + half opens that half's turn to issue; the first half has the first one, and the last is left over.
  __device__ __forceinline__ void open_turns() const {
    if (half == 1) named_barrier_arrive(1, 2 * WARPGROUP);
  }
  __device__ __forceinline__ void wait_turn() const { named_barrier(1 + half, 2 * WARPGROUP); }
  __device__ __forceinline__ void pass_turn() const { named_barrier_arrive(2 - half, 2 * WARPGROUP); }
  __device__ __forceinline__ void close_turns() const {
    if (half == 0) named_barrier(1, 2 * WARPGROUP);
  }

  // O and the softmax of the queries over all their keys.
  __device__ __forceinline__ void attend(const QTile& tile) {
    mbarrier_wait(Smem::q_full(q_ring.slot), q_ring.parity);
    const int* const first_keys = Smem::first_keys(q_ring.slot) + warp * 16;
    const int kv_begin = tile.kv_begin(Smem::first_keys(q_ring.slot)), kv_end = tile.kv_end();
    warp_row = tile.first_row + warp * 16;
    first[0] = first_keys[lane >> 2];
    first[1] = first_keys[(lane >> 2) + 8];
    all_from = first_keys[15];
    softmax.reset();
    zero(o_acc);
    uint32_t k_slot = mma_qk(), v_slot = 0;
    wgmma_wait<0>(flat(scores));
    release(k_slot);
    softmax_step(kv_begin);
    for (int kv_tile = kv_begin + 1; kv_tile < kv_end; kv_tile++) {
      // P·V of two tiles ago, at the loop's edge: from behind the softmax of the last tile the compiler would move
      // the wait before it.
      wgmma_wait<0>(flat(o_acc[0]));
      if (kv_tile > kv_begin + 1) release(v_slot);
      to_operands(p, scores);
      wait_turn();
      k_slot = mma_qk();
      rescale_o();
      v_slot = mma_pv();
      pass_turn();
      wgmma_wait<1>(flat(scores));
      release(k_slot);
      softmax_step(kv_tile);
    }
    wgmma_wait<0>(flat(o_acc[0]));
    if (kv_end > kv_begin + 1) release(v_slot);
    to_operands(p, scores);
    rescale_o();
    v_slot = mma_pv();
    wgmma_wait<0>(flat(o_acc[0]));
    release(v_slot);
  }

  // Hands O over to store_o and stores lse, where it is asked for.
  __device__ __forceinline__ void finish(const QTile& tile, float* lse, int tokens) {
    const float upper = softmax.total(0, 0), lower = softmax.total(0, 1);
    rescale(o_acc[0], 0, 1.f / upper);
    rescale(o_acc[0], 1, 1.f / lower);
    // The half's four warps have read its queries.
    named_barrier(3 + half, WARPGROUP);
    // Lane l names row l mod 8 of matrix l / 8: upper and lower rows, then the same 8 columns on.
    const int row = warp % WARPS * 16 + (lane & 15);
#pragma unroll
    for (int i = 0; i < HeadDim / 16; i++) {
      uint32_t o_operand[4];
      to_operand(o_operand, o_acc[0], i);
      const int chunk = 2 * i + (lane >> 4);
      unsigned char* const slab = Smem::q(q_ring.slot, half) + chunk / 8 * HALF * 128;
      stmatrix_x4(slab + row * 128 + ((chunk % 8 ^ (row & 7)) << 4), o_operand);
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(Smem::o_full(q_ring.slot, half));
    q_ring.next();
    if (lse == nullptr) return;
    softmax.store_lse(lse + (size_t)tile.head * tokens + warp_row, 0, tokens - warp_row, scale, upper, lower, lane);
  }
};

template <int HeadDim>
__device__ __forceinline__ void wgmma_forward(const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v,
                                              const CUtensorMap* o, float* __restrict__ lse, Documents documents,
                                              int tokens, int heads, int kv_heads, float scale) {
  if (threadIdx.x == 0) init_barriers<HeadDim>();
  __syncthreads();
  TileScheduler scheduler(tokens, heads, kv_heads);
  if (threadIdx.x < WARPGROUP) {
    registers_decrease<24>();
    if (threadIdx.x == 0) produce<HeadDim>(q, k, v, scheduler);
    else if (threadIdx.x / 32 == 1) find_keys<HeadDim>(documents, scheduler);
    else if (threadIdx.x % 32 == 0) store_o<HeadDim>(o, scheduler, threadIdx.x / 32 - 2);
    return;
  }
  registers_increase<240>();
  Consumer<HeadDim> consumer(scale);
  consumer.open_turns();
  for (; scheduler.valid(); scheduler.next()) {
    const QTile tile = scheduler.tile();
    consumer.attend(tile);
    consumer.finish(tile, lse, tokens);
  }
  consumer.close_turns();
}

#define WGMMA_FORWARD(name, head_dim)                                                                                  \
  extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1)                                                       \
      name(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,                               \
           const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap o, float* __restrict__ lse,      \
           const uint32_t* __restrict__ starts, int documents, int tokens, int heads, int kv_heads, float scale,       \
           uint32_t window) {                                                                                          \
    const Documents packed{starts, documents, window};                                                                 \
    wgmma_forward<head_dim>(&q, &k, &v, &o, lse, packed, tokens, heads, kv_heads, scale);                              \
  }                                                                                                                    \
  EXPORT(name)                                                                                                         \
  SHARED_BYTES(name, SmemLayout<head_dim>::BYTES)

// grid: at most one block a multiprocessor and a work tile, of which there are heads · ceil(tokens / 128), block:
// 384, shared: 1792·head_dim + 1184 bytes; lse may be null. Boxes of Q and O are 64 rows of 64 columns, those of K
// and V 128.
WGMMA_FORWARD(attention_forward_wgmma_hd64_bf16, 64)
WGMMA_FORWARD(attention_forward_wgmma_hd128_bf16, 128)
