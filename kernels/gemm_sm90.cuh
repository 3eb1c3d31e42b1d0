// The ends of tiles in gemm_sm90.cu: from the sums of a warpgroup to C.
//
// A warpgroup's 64 rows of a tile leave in slabs of 128 bytes of each row (64 bf16, 32 f32), swizzled as bulk tensor
// copies have it. It writes a slab to shared memory, and another warp's thread stores it with one copy, while the
// warpgroup goes on to the next slab and to the next tile's products.
#pragma once
#include "gemm.cuh"

constexpr int SLAB = 64 * 128;

// The layout of shared memory for tiles of 128 × Columns sums, of which Stored columns are stored: a ring of operands,
// for each of two warpgroups a ring of slabs (those of one tile in bf16), barriers.
template <int Columns, int Stored = Columns> struct SharedLayout {
  static constexpr int STAGES = Columns == 128 ? 6 : Stored == 128 ? 4 : 3, BUFFERS = Stored / 64;
  static constexpr int A_BYTES = 128 * 128, STAGE = A_BYTES + Columns * 128;
  static constexpr int SLABS = STAGES * STAGE, BARRIERS = SLABS + 2 * BUFFERS * SLAB;
  static constexpr int BYTES = BARRIERS + (2 * STAGES + 4 * BUFFERS) * 8;

  static __device__ __forceinline__ unsigned char* a(uint32_t slot) { return dynamic_shared + slot * STAGE; }
  static __device__ __forceinline__ unsigned char* b(uint32_t slot) { return a(slot) + A_BYTES; }
  static __device__ __forceinline__ unsigned char* slabs(uint32_t warpgroup) {
    return dynamic_shared + SLABS + warpgroup * (BUFFERS * SLAB);
  }
  // Of a stage's operands: they have come; they have been read.
  static __device__ __forceinline__ uint64_t* full(uint32_t slot) { return barriers() + slot; }
  static __device__ __forceinline__ uint64_t* empty(uint32_t slot) { return barriers() + STAGES + slot; }
  // Of a slab: it may be written (and holds what is to be added); it has been written.
  static __device__ __forceinline__ uint64_t* ready(uint32_t warpgroup, uint32_t buffer) {
    return barriers() + 2 * STAGES + 2 * BUFFERS * warpgroup + buffer;
  }
  static __device__ __forceinline__ uint64_t* written(uint32_t warpgroup, uint32_t buffer) {
    return ready(warpgroup, buffer) + BUFFERS;
  }
  static __device__ __forceinline__ uint64_t* barriers() {
    return reinterpret_cast<uint64_t*>(dynamic_shared + BARRIERS);
  }
};

enum Layout { TN, NN, NT };

// A launch takes up to MEMBERS products: of TN and NT side by side, each with its C; of NN as terms of one C, summed
// one after another. Those that are not there have no rows (TN, NT) or no depth (NN).
constexpr int MEMBERS = 3;

template <typename V> __device__ __forceinline__ V member_of(const V (&values)[MEMBERS], uint32_t member) {
  return member == 0 ? values[0] : member == 1 ? values[1] : values[2];
}
struct Maps {
  const CUtensorMap* of[MEMBERS];
};

// A tile of a member's C and the blocks of depth first … last − 1 that are summed.
struct Tile {
  uint32_t member, row, column, first, last, split;
};
// A block of depth: from k0 on of a term.
struct Depth {
  uint32_t term, k0;
};

// Tiles of 128 × Columns for blocks that stay on their SM: grid-stride over split, member and tile. Up to 64 splits:
// products of them and blocks of depth are below 2³².
template <Layout L, int Columns> struct TileScheduler {
  uint32_t m[MEMBERS], n[MEMBERS], k[MEMBERS], splits;

  static __device__ __forceinline__ uint32_t rows(uint32_t m) { return (m + 127) / 128; }
  static __device__ __forceinline__ uint32_t columns(uint32_t n) { return (n + Columns - 1) / Columns; }
  static __device__ __forceinline__ uint32_t blocks(uint32_t k) { return (k + 63) / 64; }

  __device__ __forceinline__ uint32_t tiles(int member) const { return rows(m[member]) * columns(n[member]); }
  // Of all members, for one split.
  __device__ __forceinline__ uint32_t tiles() const {
    return L == NN ? tiles(0) : tiles(0) + tiles(1) + tiles(2);
  }
  __device__ __forceinline__ uint32_t count() const { return tiles() * splits; }

  __device__ __forceinline__ Tile tile(uint32_t index) const {
    const uint32_t split = index / tiles();
    const uint32_t depth = L == NN ? blocks(k[0]) + blocks(k[1]) + blocks(k[2]) : blocks(k[0]);
    uint32_t member = 0, in_member = index % tiles();
    if (L != NN && in_member >= tiles(0)) {
      member = 1;
      in_member -= tiles(0);
      if (in_member >= tiles(1)) {
        member = 2;
        in_member -= tiles(1);
      }
    }
    const TileCoordinates at = tile_coordinates(in_member, rows(member_of(m, member)), columns(member_of(n, member)));
    return {member, at.row * 128, at.column * Columns, depth * split / splits, depth * (split + 1) / splits, split};
  }
  __device__ __forceinline__ Depth depth(const Tile& tile, uint32_t block) const {
    if (L != NN) return {tile.member, block * 64};
    const uint32_t second = blocks(k[0]), third = second + blocks(k[1]);
    if (block < second) return {0, block * 64};
    return block < third ? Depth{1, (block - second) * 64} : Depth{2, (block - third) * 64};
  }
};

// C [m, n] by bulk copies, which want it aligned to 16 bytes with rows of whole 16 bytes:
//   bf16             C = sum
//   bf16, Addends    C = alpha·sum + bias [n] + source [m, n], in this order in f32; bias on 4 bytes, or null
//   f32              C [splits, m, n] = sum, or C += sum if `accumulate` (for one split), rounded once
template <typename T, bool Addends> struct Output {
  static constexpr int WIDTH = 128 / (int)sizeof(T);
  Maps c, source;
  bool has_source;
  const bf16* bias[MEMBERS];
  float alpha;
  bool accumulate;
  uint32_t n[MEMBERS];

  // Hands a buffer over for the slab at (column, row).
  __device__ __forceinline__ void offer(unsigned char* buffer, uint64_t* ready, const Tile& tile, uint32_t column,
                                        uint32_t row) const {
    if (Addends && has_source) {
      mbarrier_expect(ready, SLAB);
      tma_load_3d(buffer, member_of(source.of, tile.member), ready, column, row, 0);
    } else {
      mbarrier_arrive(ready);
    }
  }
  __device__ __forceinline__ void store(const unsigned char* buffer, const Tile& tile, uint32_t column,
                                        uint32_t row) const {
    const CUtensorMap* const map = member_of(c.of, tile.member);
    if (sizeof(T) == 4 && accumulate) tma_add_3d(map, buffer, column, row, tile.split);
    else tma_store_3d(map, buffer, column, row, tile.split);
    tma_store_commit();
  }

  // Writes a warp's 16 rows of a slab: x as wgmma leaves sums, of columns from `column` on.
  __device__ __forceinline__ void write(unsigned char* rows, const float* x, uint32_t member, uint32_t column) const {
    const uint32_t lane = threadIdx.x & 31;
    if constexpr (sizeof(T) == 4) {
      // Lanes of odd rows write columns 16 … 31 first: a half-warp's four rows of 32 bytes lie in different banks.
      const bool odd = lane / 4 & 1;
      unsigned char* const row = rows + lane / 4 * 128 + (lane & 1) * 8;
      const uint32_t chunk = (lane & 3) / 2 ^ lane / 4 ^ (odd ? 4 : 0);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int j = i / 2, same = 4 * j + 2 * (i % 2), other = 4 * (j ^ 2) + 2 * (i % 2);
        *reinterpret_cast<float2*>(row + i % 2 * 1024 + (2 * j ^ chunk) * 16) =
            make_float2(odd ? x[other] : x[same], odd ? x[other + 1] : x[same + 1]);
      }
    } else {
      unsigned char* const row = rows + (lane & 15) * 128;
      const uint32_t chunk = lane / 16 ^ (lane & 7);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        unsigned char* const place = row + (2 * i ^ chunk) * 16;
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; e++) y[e] = x[8 * i + e];
        if constexpr (Addends) add(y, place, member, column + 16 * i + 2 * (lane & 3));
        const uint32_t r[4] = {pack2(y[0], y[1]), pack2(y[2], y[3]), pack2(y[4], y[5]), pack2(y[6], y[7])};
        stmatrix_x4(place, r);
      }
    }
  }

  // y: of rows r and r + 8, columns c and c + 1, then c + 8 and c + 9.
  __device__ __forceinline__ void add(float (&y)[8], const unsigned char* place, uint32_t member, uint32_t c) const {
    const bf16* const member_bias = member_of(bias, member);
    const uint32_t end = member_of(n, member);
#pragma unroll
    for (int e = 0; e < 8; e++) y[e] *= alpha;
    if (member_bias) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const uint32_t pair = c + 8 * i < end ? *reinterpret_cast<const uint32_t*>(member_bias + c + 8 * i) : 0;
        add_pair(y + 4 * i, pair);
        add_pair(y + 4 * i + 2, pair);
      }
    }
    if (has_source) {
      uint32_t r[4];
      ldmatrix_x4(r, place);
#pragma unroll
      for (int i = 0; i < 4; i++) add_pair(y + 2 * i, r[i]);
    }
  }
  static __device__ __forceinline__ void add_pair(float* y, uint32_t pair) {
    y[0] += __uint_as_float(pair << 16);
    y[1] += __uint_as_float(pair & 0xffff0000u);
  }
};

// The warpgroup's part: sums to slabs, those of the first Stored columns. `phase`: times that its ring of slabs has
// been gone through.
template <int Columns, int Stored, typename T, bool Addends>
__device__ __forceinline__ void finish_tile(const Output<T, Addends>& output, const float (&sums)[Columns / 2],
                                            const Tile& tile, uint32_t warpgroup, uint32_t& phase) {
  typedef SharedLayout<Columns, Stored> Shared;
  constexpr int WIDTH = Output<T, Addends>::WIDTH, SLABS = Stored / WIDTH, BUFFERS = Shared::BUFFERS;
  unsigned char* const rows = Shared::slabs(warpgroup) + threadIdx.x % 128 / 32 * 2048;
#pragma unroll
  for (int s = 0; s < SLABS; s++) {
    mbarrier_wait(Shared::ready(warpgroup, s % BUFFERS), phase + s / BUFFERS & 1);
    output.write(rows + s % BUFFERS * SLAB, sums + s * (WIDTH / 2), tile.member, tile.column + s * WIDTH);
    fence_proxy_async();
    __syncwarp();
    if ((threadIdx.x & 31) == 0) mbarrier_arrive(Shared::written(warpgroup, s % BUFFERS));
  }
  phase += SLABS / BUFFERS;
}

// The storing thread's part, for all tiles of the block.
template <int Columns, Layout L, int Stored, typename T, bool Addends>
__device__ __forceinline__ void store_tiles(const Output<T, Addends>& output,
                                            const TileScheduler<L, Stored>& scheduler, uint32_t warpgroup) {
  typedef SharedLayout<Columns, Stored> Shared;
  constexpr uint32_t WIDTH = Output<T, Addends>::WIDTH, SLABS = Stored / WIDTH, BUFFERS = Shared::BUFFERS;
  const uint32_t count = scheduler.count(), row = 64 * warpgroup;
  const auto offer = [&](uint32_t slab, const Tile& tile) {
    output.offer(Shared::slabs(warpgroup) + slab * SLAB, Shared::ready(warpgroup, slab), tile,
                 tile.column + slab * WIDTH, tile.row + row);
  };
  Tile tile = scheduler.tile(blockIdx.x);
#pragma unroll 1
  for (uint32_t slab = 0; slab < BUFFERS; slab++) offer(slab, tile);
  uint32_t phase = 0;
  for (uint32_t index = blockIdx.x; index < count; index += gridDim.x, phase += SLABS / BUFFERS) {
    const bool more = index + gridDim.x < count;
    const Tile next = scheduler.tile(more ? index + gridDim.x : index);
    // A slab of this tile has been read: its buffer is for a later one.
    const auto release = [&](uint32_t slab) {
      if (slab + BUFFERS < SLABS) mbarrier_arrive(Shared::ready(warpgroup, slab % BUFFERS));
      else if (more) offer(slab % BUFFERS, next);
    };
#pragma unroll 1
    for (uint32_t slab = 0; slab < SLABS; slab++) {
      mbarrier_wait(Shared::written(warpgroup, slab % BUFFERS), phase + slab / BUFFERS & 1);
      output.store(Shared::slabs(warpgroup) + slab % BUFFERS * SLAB, tile, tile.column + slab * WIDTH, tile.row + row);
      if (slab == 0) continue;
      tma_store_wait_read<1>();
      release(slab - 1);
    }
    tma_store_wait_read<0>();
    release(SLABS - 1);
    tile = next;
  }
}

// Any C and addends of one product: by rows of 64 columns through the slabs' memory.
template <int Columns, int Stored, typename T>
__device__ __forceinline__ void finish_tile(Epilogue<T> epilogue, const float (&sums)[Columns / 2], const Tile& tile,
                                            uint32_t warpgroup, uint32_t&) {
  const uint32_t warp = 4 * warpgroup + threadIdx.x % 128 / 32;
  float* const stage = reinterpret_cast<float*>(SharedLayout<Columns>::slabs(0)) + warp * (16 * 64);
  const bool vectorised = epilogue.vectorised();
  if (epilogue.partials) epilogue.partials += (size_t)tile.split * epilogue.m * epilogue.n;
#pragma unroll
  for (int c = 0; c < Columns / 64; c++)
    store_rows16<64, 1>(stage, epilogue, vectorised, tile.row + 16 * warp, tile.column + 64 * c,
                        [&](int j, int e) { return sums[4 * (8 * c + j) + e]; });
}
template <int Columns, Layout L, int Stored, typename T>
__device__ __forceinline__ void store_tiles(const Epilogue<T>&, const TileScheduler<L, Stored>&, uint32_t) {}
