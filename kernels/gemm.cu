// Products of linear layers: C [m, n] = alpha·A·B + bias [n] + residual [m, n] + C, bf16 operands, f32 sums, in the
// three layouts of a layer with X [tokens, inputs], W [outputs, inputs]; all matrices dense and row-major in memory:
//
//   layout  product       m, n, k                    A in memory  B in memory  C
//   tn      Y = X·Wᵀ      tokens, outputs, inputs    [m, k]       [n, k]       bf16
//   nn      dX = dY·W     tokens, inputs, outputs    [m, k]       [k, n]       bf16
//   nt      dW = dYᵀ·X    outputs, inputs, tokens    [k, m]       [k, n]       f32 or bf16
//
// Any sizes. `mma128` and `mma64` want A and B aligned to 16 bytes with rows of whole 16 bytes; the other operands may
// lie anywhere (accesses of 4 elements where alignment allows, else of one).
//
//   kernel      bytes                     FLOPs    at 4096 × 4096 × 4096, 800 TFLOP/s and 3.0 TB/s
//   gemm_*      2·(mk + nk) + |C|·mn      2·mnk    0.17 ms (mma.sync reaches about 60 % of wgmma's rate)
//   gemm_combine  4·splits·mn + |C|·mn    splits·mn
//
// Layers of one X (q, k and v; gate and up) go in one launch of up to three products, each with tensors of its own:
//   gemm_tn_each  Yᵢ = X·Wᵢᵀ + biasᵢ      the tiles of the products one after another in one grid
//   gemm_nt_each  dWᵢ = dYᵢᵀ·X (+ dWᵢ)    the same
//   gemm_nn_sum   dX = Σ dYᵢ·Wᵢ (+ dX)    one f32 sum over the depths one after another, rounded once
//
// gemm_tn_swiglu  Y = silu(X·Gᵀ)·(X·Uᵀ), the sums rounded to bf16 first, as if SwiGLU read them from memory. Half of a
// warp's columns are gate's and half are up's, so that a thread has both sums of an output.
//
// Rounding: once, to nearest even, when C is stored. Sums: an output's k are added in ascending blocks of 16, each by
// the tensor core. With `partials`, block (tile, s) sums k-blocks s·K/splits … (s+1)·K/splits into partials[s], and
// gemm_combine adds s = 0, 1, … in order: results depend on the shape and on `splits`, never on timing.
//
// Shared memory: a ring of STAGES tiles filled by cp.async. Lines of a tile (of k where K is contiguous, else of m or
// n) are cut into 16-byte chunks, permuted in a line by the line's number: the 8 chunks that an ldmatrix or a
// quarter-warp's cp.async touches lie in different banks. Operands whose k is not contiguous are read with
// ldmatrix.trans.
//
// Versions: baseline, an output a thread; mma64, tiles 64 × 64 × 64: wins where 128 × 128 tiles would not fill the
// device; mma128, tiles 128 × 128 × 32, warps of 64 × 64: wins elsewhere without Hopper (gemm_sm90.cu); scalar64:
// mma64 for operands that are not aligned, tiles filled by 2-byte loads: for odd sizes only; decode (gemm_decode.cu):
// few tokens.
#include "gemm.cuh"
#include "swiglu.cuh"

enum Layout { TN, NN, NT };

// Operands of a block of depth, from k0 on, of matrices that are k deep; `up` where b is gate.
struct Slab {
  const bf16 *a, *b;
  uint32_t k, k0;
  const bf16* up;
};

struct Product {
  static constexpr bool GATED = false;
  const bf16 *a, *b;
  uint32_t m, n, k;

  // Blocks of depth, and the operands of one.
  template <int Depth> __device__ __forceinline__ uint32_t blocks() const { return (k + Depth - 1) / Depth; }
  template <int Depth> __device__ __forceinline__ Slab slab(uint32_t block) const {
    return {a, b, k, block * Depth, nullptr};
  }
  template <int Tile> __device__ __forceinline__ uint32_t tiles() const {
    return (m + Tile - 1) / Tile * ((n + Tile - 1) / Tile);
  }
};

// silu(a·gateᵀ)·(a·upᵀ).
struct GatedProduct {
  static constexpr bool GATED = true;
  const bf16 *a, *gate, *up;
  uint32_t m, n, k;

  template <int Depth> __device__ __forceinline__ uint32_t blocks() const { return (k + Depth - 1) / Depth; }
  template <int Depth> __device__ __forceinline__ Slab slab(uint32_t block) const {
    return {a, gate, k, block * Depth, up};
  }
};

constexpr int MEMBERS = 3;

// The sum of products of one C [m, n]: their blocks of depth one after another.
struct Sum {
  static constexpr bool GATED = false;
  Product terms[MEMBERS];
  uint32_t m, n;

  template <int Depth> __device__ __forceinline__ uint32_t blocks() const {
    return terms[0].blocks<Depth>() + terms[1].blocks<Depth>() + terms[2].blocks<Depth>();
  }
  template <int Depth> __device__ __forceinline__ Slab slab(uint32_t block) const {
    const uint32_t second = terms[0].blocks<Depth>(), third = second + terms[1].blocks<Depth>();
    if (block < second) return terms[0].slab<Depth>(block);
    if (block < third) return terms[1].slab<Depth>(block - second);
    return terms[2].slab<Depth>(block - third);
  }
};

// grid: ceil(m·n / 256), block: 256, no shared memory
template <Layout L, typename T> __device__ __forceinline__ void baseline(const Product p, const Epilogue<T> epilogue) {
  const size_t i = (size_t)blockIdx.x * 256 + threadIdx.x;
  if (i >= (size_t)p.m * p.n) return;
  const uint32_t row = i / p.n, column = i % p.n;
  float sum = 0.f;
  for (uint32_t k = 0; k < p.k; k++) {
    const bf16 a = L == NT ? p.a[(size_t)k * p.m + row] : p.a[(size_t)row * p.k + k];
    const bf16 b = L == TN ? p.b[(size_t)column * p.k + k] : p.b[(size_t)k * p.n + column];
    sum += __bfloat162float(a) * __bfloat162float(b);
  }
  epilogue.store(row, column, sum);
}

// One operand's tile in shared memory: Extent (of m or n) × Depth (of k), K contiguous or not.
template <bool KMajor, int Extent, int Depth, int Threads, bool Aligned> struct Operand {
  static constexpr int LINES = KMajor ? Extent : Depth, CHUNKS = (KMajor ? Depth : Extent) / 8;
  static constexpr int BYTES = Extent * Depth * 2;
  static_assert(CHUNKS == 4 || CHUNKS == 8 || CHUNKS == 16, "the permutation below");

  static __device__ __forceinline__ unsigned char* chunk(unsigned char* tile, uint32_t line, uint32_t chunk) {
    return tile + 16 * (line * CHUNKS + (chunk ^ (CHUNKS == 4 ? (line >> 1) & 3 : line & 7)));
  }

  // Fills the tile that begins at (extent0, k0) of the operand; what lies outside is zero.
  static __device__ __forceinline__ void fill(unsigned char* tile, const bf16* from, uint32_t extent0, uint32_t k0,
                                              uint32_t extent, uint32_t depth) {
    const uint32_t line0 = KMajor ? extent0 : k0, lines = KMajor ? extent : depth;
    const uint32_t column0 = KMajor ? k0 : extent0, columns = KMajor ? depth : extent;
#pragma unroll
    for (int i = 0; i < LINES * CHUNKS / Threads; i++) {
      const uint32_t place = i * Threads + threadIdx.x, l = place / CHUNKS, c = place % CHUNKS;
      const uint32_t line = line0 + l, column = column0 + 8 * c;
      const bool inside = line < lines && column < columns;
      const bf16* source = from + (inside ? (size_t)line * columns + column : 0);
      unsigned char* to = chunk(tile, l, c);
      if (Aligned) {
        cp_async16(to, source, inside ? 16 : 0);
      } else {
        float x[8];
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = inside && column + e < columns ? __bfloat162float(source[e]) : 0.f;
        *reinterpret_cast<uint4*>(to) = pack8(x);
      }
    }
  }

  // Fills a tile of two operands whose k is contiguous, from (extent0, k0) of both: Run lines of gate, Run of up, the
  // next Run of gate, …
  template <int Run>
  static __device__ __forceinline__ void fill_runs(unsigned char* tile, const bf16* gate, const bf16* up,
                                                   uint32_t extent0, uint32_t k0, uint32_t extent, uint32_t depth) {
    static_assert(KMajor && Aligned, "lines of gate and up");
#pragma unroll
    for (int i = 0; i < LINES * CHUNKS / Threads; i++) {
      const uint32_t place = i * Threads + threadIdx.x, l = place / CHUNKS, c = place % CHUNKS;
      const uint32_t line = extent0 + l / (2 * Run) * Run + l % Run, column = k0 + 8 * c;
      const bool inside = line < extent && column < depth;
      const bf16* from = l / Run % 2 == 0 ? gate : up;
      cp_async16(chunk(tile, l, c), from + (inside ? (size_t)line * depth + column : 0), inside ? 16 : 0);
    }
  }

  // Rows extent0 … +15, depth k0 … +15 as the A operand of mma.
  static __device__ __forceinline__ void load_a(uint32_t (&r)[4], unsigned char* tile, uint32_t extent0, uint32_t k0) {
    const uint32_t lane = threadIdx.x & 31;
    if (KMajor) {
      ldmatrix_x4(r, chunk(tile, extent0 + (lane & 15), k0 / 8 + lane / 16));
    } else {
      ldmatrix_x4_trans(r, chunk(tile, k0 + (lane & 7) + lane / 16 * 8, extent0 / 8 + (lane / 8 & 1)));
    }
  }

  // Columns extent0 … +15, depth k0 … +15 as two B operands.
  static __device__ __forceinline__ void load_b(uint32_t (&r)[4], unsigned char* tile, uint32_t extent0, uint32_t k0) {
    const uint32_t lane = threadIdx.x & 31;
    if (KMajor) {
      ldmatrix_x4(r, chunk(tile, extent0 + (lane & 7) + lane / 16 * 8, k0 / 8 + (lane / 8 & 1)));
    } else {
      ldmatrix_x4_trans(r, chunk(tile, k0 + (lane & 15), extent0 / 8 + lane / 16));
    }
  }
};

constexpr int STAGES = 4, THREADS = 128;

// A tile of a Product or a Sum; of a GatedProduct one of Tile × Tile/2 outputs. Four warps, 2 × 2, each of Tile/2 ×
// Tile/2 sums.
template <Layout L, int Tile, int Depth, bool Aligned, typename P, typename T>
__device__ __forceinline__ void mma(uint32_t tile, const P p, Epilogue<T> epilogue) {
  typedef Operand<L != NT, Tile, Depth, THREADS, Aligned> OperandA;
  typedef Operand<L == TN, Tile, Depth, THREADS, Aligned> OperandB;
  constexpr int HALF = Tile / 2, ROWS = HALF / 16, COLUMNS = HALF / 8, STAGE = OperandA::BYTES + OperandB::BYTES;
  constexpr int WIDTH = P::GATED ? HALF : Tile;
  const uint32_t warp = threadIdx.x / 32, row_in_tile = warp / 2 * HALF, column_in_tile = warp % 2 * HALF;
  const TileCoordinates place = tile_coordinates(tile, (p.m + Tile - 1) / Tile, (p.n + WIDTH - 1) / WIDTH);
  const uint32_t row0 = place.row * Tile, column0 = place.column * WIDTH;
  const uint32_t blocks = p.template blocks<Depth>();
  const uint32_t first = (uint64_t)blocks * blockIdx.y / gridDim.y;
  const uint32_t last = (uint64_t)blocks * (blockIdx.y + 1) / gridDim.y;
  if (epilogue.partials) epilogue.partials += (size_t)blockIdx.y * p.m * p.n;

  const auto fill = [&](uint32_t block) {
    if (block < last) {
      unsigned char* stage = dynamic_shared + (block - first) % STAGES * STAGE;
      const Slab slab = p.template slab<Depth>(block);
      OperandA::fill(stage, slab.a, row0, slab.k0, p.m, slab.k);
      unsigned char* const to = stage + OperandA::BYTES;
      if constexpr (P::GATED)
        OperandB::template fill_runs<HALF / 2>(to, slab.b, slab.up, column0, slab.k0, p.n, slab.k);
      else
        OperandB::fill(to, slab.b, column0, slab.k0, p.n, slab.k);
    }
    cp_async_commit();
  };
  float sums[ROWS][COLUMNS][4];
#pragma unroll
  for (int i = 0; i < ROWS; i++)
#pragma unroll
    for (int j = 0; j < COLUMNS; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[i][j][e] = 0.f;

#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) fill(first + s);
  for (uint32_t block = first; block < last; block++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    fill(block + STAGES - 1);
    unsigned char* tile_a = dynamic_shared + (block - first) % STAGES * STAGE;
    unsigned char* tile_b = tile_a + OperandA::BYTES;
    uint32_t a[2][ROWS][4], b[2][COLUMNS / 2][4];
    const auto load = [&](int slot, int k) {
#pragma unroll
      for (int i = 0; i < ROWS; i++) OperandA::load_a(a[slot][i], tile_a, row_in_tile + 16 * i, k);
#pragma unroll
      for (int j = 0; j < COLUMNS / 2; j++) OperandB::load_b(b[slot][j], tile_b, column_in_tile + 16 * j, k);
    };
    load(0, 0);
#pragma unroll
    for (int step = 0; step < Depth / 16; step++) {
      if (step + 1 < Depth / 16) load((step + 1) & 1, 16 * (step + 1));
#pragma unroll
      for (int i = 0; i < ROWS; i++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
          const uint32_t pair[2] = {b[step & 1][j / 2][j % 2 * 2], b[step & 1][j / 2][j % 2 * 2 + 1]};
          mma_bf16(sums[i][j], a[step & 1][i], pair);
        }
    }
  }

  cp_async_wait<0>();
  __syncthreads();
  float* stage = reinterpret_cast<float*>(dynamic_shared) + warp * 16 * HALF;
  const bool vectorised = epilogue.vectorised();
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    const uint32_t row = row0 + row_in_tile + 16 * i;
    if constexpr (P::GATED)
      store_rows16<HALF / 2, 4>(
          stage, epilogue, vectorised, row, column0 + column_in_tile / 2,
          [&](int j, int e) { return swiglu_of_sums(sums[i][j][e], sums[i][j + COLUMNS / 2][e]); });
    else
      store_rows16<HALF, 4>(stage, epilogue, vectorised, row, column0 + column_in_tile,
                            [&](int j, int e) { return sums[i][j][e]; });
  }
}

// A tile of one of several products, which the grid takes one after another.
template <Layout L, int Tile, int Depth, typename T>
__device__ __forceinline__ void each(const Product (&products)[MEMBERS], const Epilogue<T> (&epilogues)[MEMBERS]) {
  Product own = products[0];
  Epilogue<T> epilogue = epilogues[0];
  uint32_t first = 0, end = own.tiles<Tile>();
#pragma unroll
  for (int i = 1; i < MEMBERS; i++) {
    if (blockIdx.x < end) continue;
    own = products[i];
    epilogue = epilogues[i];
    first = end;
    end += own.tiles<Tile>();
  }
  mma<L, Tile, Depth, true>(blockIdx.x - first, own, epilogue);
}

#define GEMM_ARGUMENTS(T)                                                                                              \
  const bf16 *__restrict__ a, const bf16 *__restrict__ b, T *c, const bf16 *__restrict__ bias, const bf16 *residual,   \
      float *__restrict__ partials, float alpha, uint32_t accumulate, uint32_t m, uint32_t n, uint32_t k
#define GEMM_PASS(T) Product{a, b, m, n, k}, Epilogue<T>{c, bias, residual, partials, alpha, accumulate != 0, m, n}

// A layout's kernels for one type of C.
// baseline  grid: ceil(m·n / 256), block: 256, no shared memory; no partials
// mma128    grid: (ceil(m / 128)·ceil(n / 128), splits), block: 128
// mma64     grid: (ceil(m / 64)·ceil(n / 64), splits), block: 128
// scalar64  as mma64
#define GEMM_LAYOUT(LAYOUT, name, dtype, T)                                                                            \
  extern "C" __global__ void __launch_bounds__(256) gemm_##name##_baseline_##dtype(GEMM_ARGUMENTS(T)) {                \
    baseline<LAYOUT>(GEMM_PASS(T));                                                                                    \
  }                                                                                                                    \
  EXPORT(gemm_##name##_baseline_##dtype)                                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS, 2) gemm_##name##_mma128_##dtype(GEMM_ARGUMENTS(T)) {           \
    mma<LAYOUT, 128, 32, true>(blockIdx.x, GEMM_PASS(T));                                                              \
  }                                                                                                                    \
  EXPORT(gemm_##name##_mma128_##dtype)                                                                                 \
  SHARED_BYTES(gemm_##name##_mma128_##dtype, STAGES * 2 * 128 * 32 * 2)                                                \
  extern "C" __global__ void __launch_bounds__(THREADS, 3) gemm_##name##_mma64_##dtype(GEMM_ARGUMENTS(T)) {            \
    mma<LAYOUT, 64, 64, true>(blockIdx.x, GEMM_PASS(T));                                                               \
  }                                                                                                                    \
  EXPORT(gemm_##name##_mma64_##dtype)                                                                                  \
  SHARED_BYTES(gemm_##name##_mma64_##dtype, STAGES * 2 * 64 * 64 * 2)                                                  \
  extern "C" __global__ void __launch_bounds__(THREADS, 3) gemm_##name##_scalar64_##dtype(GEMM_ARGUMENTS(T)) {         \
    mma<LAYOUT, 64, 64, false>(blockIdx.x, GEMM_PASS(T));                                                              \
  }                                                                                                                    \
  EXPORT(gemm_##name##_scalar64_##dtype)                                                                               \
  SHARED_BYTES(gemm_##name##_scalar64_##dtype, STAGES * 2 * 64 * 64 * 2)

GEMM_LAYOUT(TN, tn, bf16, bf16)
GEMM_LAYOUT(NN, nn, bf16, bf16)
GEMM_LAYOUT(NT, nt, bf16, bf16)
GEMM_LAYOUT(NT, nt, f32, float)

// Up to three products; one that is not there has no rows or no columns.
// mma128  grid: (sum of ceil(m / 128)·ceil(n / 128), splits), block: 128, shared: 65536 bytes
// mma64   grid: (sum of ceil(m / 64)·ceil(n / 64), splits), block: 128, shared: 65536 bytes
#define GEMM_EACH_ARGUMENTS(T)                                                                                         \
  const bf16 *__restrict__ a0, const bf16 *__restrict__ a1, const bf16 *__restrict__ a2, const bf16 *__restrict__ b0,  \
      const bf16 *__restrict__ b1, const bf16 *__restrict__ b2, T *c0, T *c1, T *c2, const bf16 *__restrict__ bias0,   \
      const bf16 *__restrict__ bias1, const bf16 *__restrict__ bias2, float *__restrict__ partials0,                   \
      float *__restrict__ partials1, float *__restrict__ partials2, uint32_t accumulate, uint32_t m0, uint32_t m1,     \
      uint32_t m2, uint32_t n0, uint32_t n1, uint32_t n2, uint32_t k
#define GEMM_EACH_PASS                                                                                                 \
  {{a0, b0, m0, n0, k}, {a1, b1, m1, n1, k}, {a2, b2, m2, n2, k}},                                                     \
      {{c0, bias0, nullptr, partials0, 1.f, accumulate != 0, m0, n0},                                                  \
       {c1, bias1, nullptr, partials1, 1.f, accumulate != 0, m1, n1},                                                  \
       {c2, bias2, nullptr, partials2, 1.f, accumulate != 0, m2, n2}}
#define GEMM_EACH(LAYOUT, name, dtype, T)                                                                              \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                             \
      gemm_##name##_each_mma128_##dtype(GEMM_EACH_ARGUMENTS(T)) {                                                      \
    each<LAYOUT, 128, 32, T>(GEMM_EACH_PASS);                                                                          \
  }                                                                                                                    \
  EXPORT(gemm_##name##_each_mma128_##dtype)                                                                            \
  SHARED_BYTES(gemm_##name##_each_mma128_##dtype, STAGES * 2 * 128 * 32 * 2)                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                             \
      gemm_##name##_each_mma64_##dtype(GEMM_EACH_ARGUMENTS(T)) {                                                       \
    each<LAYOUT, 64, 64, T>(GEMM_EACH_PASS);                                                                           \
  }                                                                                                                    \
  EXPORT(gemm_##name##_each_mma64_##dtype)                                                                             \
  SHARED_BYTES(gemm_##name##_each_mma64_##dtype, STAGES * 2 * 64 * 64 * 2)

GEMM_EACH(TN, tn, bf16, bf16)
GEMM_EACH(NT, nt, bf16, bf16)
GEMM_EACH(NT, nt, f32, float)

// Up to three terms; one that is not there has no depth. Grids, blocks and shared memory as of one product.
#define GEMM_SUM(VERSION, BLOCKS, TILE, DEPTH)                                                                         \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemm_nn_sum_##VERSION##_bf16(                          \
      const bf16* __restrict__ a0, const bf16* __restrict__ a1, const bf16* __restrict__ a2,                           \
      const bf16* __restrict__ b0, const bf16* __restrict__ b1, const bf16* __restrict__ b2, bf16* c,                  \
      float* __restrict__ partials, uint32_t accumulate, uint32_t m, uint32_t n, uint32_t k0, uint32_t k1,             \
      uint32_t k2) {                                                                                                   \
    const Sum sum = {{{a0, b0, m, n, k0}, {a1, b1, m, n, k1}, {a2, b2, m, n, k2}}, m, n};                              \
    mma<NN, TILE, DEPTH, true>(blockIdx.x, sum,                                                                        \
                               Epilogue<bf16>{c, nullptr, nullptr, partials, 1.f, accumulate != 0, m, n});             \
  }                                                                                                                    \
  EXPORT(gemm_nn_sum_##VERSION##_bf16)                                                                                 \
  SHARED_BYTES(gemm_nn_sum_##VERSION##_bf16, STAGES * 2 * (TILE) * (DEPTH) * 2)

GEMM_SUM(mma128, 2, 128, 32)
GEMM_SUM(mma64, 3, 64, 64)

// mma128  grid: ceil(m / 128)·ceil(n / 64), block: 128, shared: 65536 bytes
// mma64   grid: ceil(m / 64)·ceil(n / 32), block: 128, shared: 65536 bytes
#define GEMM_SWIGLU(VERSION, BLOCKS, TILE, DEPTH)                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) gemm_tn_swiglu_##VERSION##_bf16(                       \
      const bf16* __restrict__ a, const bf16* __restrict__ gate, const bf16* __restrict__ up, bf16* c, uint32_t m,     \
      uint32_t n, uint32_t k) {                                                                                        \
    mma<TN, TILE, DEPTH, true>(blockIdx.x, GatedProduct{a, gate, up, m, n, k},                                         \
                               Epilogue<bf16>{c, nullptr, nullptr, nullptr, 1.f, false, m, n});                        \
  }                                                                                                                    \
  EXPORT(gemm_tn_swiglu_##VERSION##_bf16)                                                                              \
  SHARED_BYTES(gemm_tn_swiglu_##VERSION##_bf16, STAGES * 2 * (TILE) * (DEPTH) * 2)

GEMM_SWIGLU(mma128, 2, 128, 32)
GEMM_SWIGLU(mma64, 3, 64, 64)

// C = epilogue(partials[0] + partials[1] + …), f32 [splits, m, n].
template <typename T>
__device__ __forceinline__ void combine(const float* __restrict__ partials, uint32_t splits,
                                        const Epilogue<T> epilogue) {
  const size_t size = (size_t)epilogue.m * epilogue.n;
  const size_t stride = (size_t)gridDim.x * 256, first = (size_t)blockIdx.x * 256 + threadIdx.x;
  if (epilogue.vectorised()) {
    for (size_t i = 4 * first; i < size; i += 4 * stride) {
      float4 sum = load4(partials + i);
      for (uint32_t s = 1; s < splits; s++) add4(sum, load4(partials + s * size + i));
      epilogue.store_vector(i / epilogue.n, i % epilogue.n, sum);
    }
  } else {
    for (size_t i = first; i < size; i += stride) {
      float sum = partials[i];
      for (uint32_t s = 1; s < splits; s++) sum += partials[s * size + i];
      epilogue.store(i / epilogue.n, i % epilogue.n, sum);
    }
  }
}

// grid: any, block: 256, no shared memory
#define GEMM_COMBINE(dtype, T)                                                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
      gemm_combine_##dtype(const float* __restrict__ partials, uint32_t splits, T* c, const bf16* __restrict__ bias,   \
                           const bf16* residual, float alpha, uint32_t accumulate, uint32_t m, uint32_t n) {           \
    combine<T>(partials, splits, {c, bias, residual, nullptr, alpha, accumulate != 0, m, n});                          \
  }                                                                                                                    \
  EXPORT(gemm_combine_##dtype)

GEMM_COMBINE(bf16, bf16)
GEMM_COMBINE(f32, float)
