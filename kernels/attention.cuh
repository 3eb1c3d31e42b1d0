// What the attention kernels share: which rows see which, tiles in shared memory, and their way into mma operands.
//
// Rows of a packed batch: document i holds rows starts[i] .. starts[i + 1]. Query r sees key c where both lie in one document, c ≤ r and
// c + window > r. Both bounds rise with the row, so that a tile of rows is bounded by those of its first and last row:
//   keys of queries a..b    first_key(a) .. b,     all of them seen by all from first_key(b) to a;
//   queries of keys a..b    a .. last_query(b),    all of them seeing all from b to last_query(a).
// Tiles lie on a fixed grid over the packed rows. Aligning them to documents would cost a table (built, uploaded, kept for each batch)
// and saves nothing: a tile that straddles an edge runs over the keys of both documents, and two aligned tiles would run over the same.
//
// A tile is `rows` × HeadDim bf16 in chunks of 16 bytes, chunk c of row r at place c ^ (r & 7) of its row: eight rows of one chunk
// column, which is what ldmatrix reads and what the copies write, lie in eight different groups of four banks. Tiles are named by their
// offset in bytes (a multiple of 1024) in dynamic shared memory.
#pragma once
#include "prelude.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

struct Documents {
  const uint32_t* starts;  // documents + 1
  int documents;
  uint32_t window;  // UINT32_MAX where there is none

  // The document that holds `row`, looked for from `from` on.
  __device__ __forceinline__ int of(int row, int from = 0) const {
    int low = from, high = documents;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (starts[middle] <= (uint32_t)row) low = middle;
      else high = middle;
    }
    return low;
  }
  // The first key that query `row` of a document that begins at `start` sees.
  __device__ __forceinline__ int first_key(int row, int start) const {
    const uint32_t before = (uint32_t)row < window ? 0u : (uint32_t)row - window + 1u;
    return (int)before > start ? (int)before : start;
  }
  __device__ __forceinline__ int first_key(int row) const { return first_key(row, (int)starts[of(row)]); }
  // The last query that sees key `row` of a document that ends before `end`.
  __device__ __forceinline__ int last_query(int row, int end) const {
    return window < (uint32_t)(end - row) ? row + (int)window - 1 : end - 1;
  }
  __device__ __forceinline__ int last_query(int row) const { return last_query(row, (int)starts[of(row) + 1]); }
};

// Keys of a chunk of the decode form. A constant, so that an answer does not depend on what else is decoded in the same step.
constexpr int DECODE_KEYS = 256;

// The keys of one chunk of a span (start, len) of which the last `window` are seen.
struct Chunk {
  uint32_t seen;
  size_t first;
  int count;  // ≤ 0 behind the end

  __device__ __forceinline__ Chunk(const uint32_t* span, uint32_t window, uint32_t chunk) {
    seen = span[1] < window ? span[1] : window;
    first = (size_t)span[0] + (span[1] - seen) + (size_t)chunk * DECODE_KEYS;
    const int left = (int)seen - (int)(chunk * DECODE_KEYS);
    count = left < DECODE_KEYS ? left : DECODE_KEYS;
  }
  __device__ __forceinline__ int chunks() const { return (int)((seen + DECODE_KEYS - 1) / DECODE_KEYS); }
};

// Bytes from the start of a tile to its chunk.
template <int HeadDim> __device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * HeadDim * 2 + ((chunk ^ (row & 7)) << 4);
}

// Starts the copy of rows 0 .. rows of `from` + `at` (and `stride`, in elements) to a tile; rows behind them become zeros. The threads
// thread, thread + Threads, … of the caller share the work. 32 bits a place: pointers alone would take ten registers of the loops.
template <int HeadDim, int Rows, int Threads>
__device__ __forceinline__ void copy_tile(int tile, const bf16* from, uint32_t at, uint32_t stride, int rows, int thread) {
  constexpr int Chunks = HeadDim / 8, Step = Threads / Chunks;
  static_assert(Rows % Step == 0, "no tail");
  const int first = thread / Chunks, chunk = thread % Chunks;
#pragma unroll
  for (int i = 0; i < Rows / Step; i++) {
    const int row = first + i * Step;
    const bool inside = row < rows;
    cp_async16(dynamic_shared + tile + chunk_offset<HeadDim>(row, chunk), from + (at + (inside ? row : 0) * stride + chunk * 8), inside ? 16 : 0);
  }
}

// Offset of a lane's row for ldmatrix of 16 rows × 16 columns, as A operand, or transposed as B operand of two n8 tiles. Columns 16·i are
// at offset ^ (i << 5).
template <int HeadDim> __device__ __forceinline__ int lane_offset_a(int lane) { return chunk_offset<HeadDim>(lane & 15, lane >> 4); }
// The same for the B operand of two n8 tiles whose columns are the tile's rows.
template <int HeadDim> __device__ __forceinline__ int lane_offset_b(int lane) {
  return chunk_offset<HeadDim>((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
}

// products[t][n] += A · Bᵀ over 16 columns of A and B: `b` is the offset of the caller's lane_offset_b in the first 16 rows of B.
template <int HeadDim, int Tiles, int Columns>
__device__ __forceinline__ void multiply_step(float (&products)[Tiles][Columns][4], const uint32_t (&rows)[Tiles][4], int b) {
#pragma unroll
  for (int n = 0; n < Columns; n += 2) {
    uint32_t pair[4];
    ldmatrix_x4(pair, dynamic_shared + n * 8 * HeadDim * 2 + b);
    const uint32_t first[2] = {pair[0], pair[1]}, second[2] = {pair[2], pair[3]};
#pragma unroll
    for (int t = 0; t < Tiles; t++) {
      mma_bf16(products[t][n], rows[t], first);
      mma_bf16(products[t][n + 1], rows[t], second);
    }
  }
}

// products[t][n] += A · Bᵀ for 16·Tiles rows of A, which begin at offset `a`, and 8·Columns rows of B, which begin at offset `b`.
template <int HeadDim, int Tiles, int Columns>
__device__ __forceinline__ void multiply_transposed(float (&products)[Tiles][Columns][4], int a, int b, int lane) {
  a += lane_offset_a<HeadDim>(lane);
  b += lane_offset_b<HeadDim>(lane);
#pragma unroll(2)
  for (int k = 0; k < HeadDim / 16; k++) {
    uint32_t rows[Tiles][4];
#pragma unroll
    for (int t = 0; t < Tiles; t++) ldmatrix_x4(rows[t], dynamic_shared + t * 16 * HeadDim * 2 + (a ^ k << 5));
    multiply_step<HeadDim>(products, rows, b ^ k << 5);
  }
}

// The A operand of columns 16·k .. of a tile of sums, rounded to bf16.
template <int Columns> __device__ __forceinline__ void round_operand(uint32_t (&operand)[4], const float (&sums)[Columns][4], int k) {
  operand[0] = pack2(sums[2 * k][0], sums[2 * k][1]);
  operand[1] = pack2(sums[2 * k][2], sums[2 * k][3]);
  operand[2] = pack2(sums[2 * k + 1][0], sums[2 * k + 1][1]);
  operand[3] = pack2(sums[2 * k + 1][2], sums[2 * k + 1][3]);
}

// sums[t][n] += A · B: A the 16·Tiles × 8·Columns weights, rounded to bf16; B 8·Columns rows, which begin at offset `b`.
template <int HeadDim, int Tiles, int Columns>
__device__ __forceinline__ void multiply_weights(float (&sums)[Tiles][HeadDim / 8][4], const float (&weights)[Tiles][Columns][4],
                                                 int b, int lane) {
  b += lane_offset_a<HeadDim>(lane);
#pragma unroll
  for (int k = 0; k < Columns / 2; k++) {
    uint32_t rows[Tiles][4];
#pragma unroll
    for (int t = 0; t < Tiles; t++) round_operand(rows[t], weights[t], k);
#pragma unroll
    for (int n = 0; n < HeadDim / 16; n++) {
      uint32_t pair[4];
      ldmatrix_x4_trans(pair, dynamic_shared + k * 16 * HeadDim * 2 + (b ^ n << 5));
      const uint32_t first[2] = {pair[0], pair[1]}, second[2] = {pair[2], pair[3]};
#pragma unroll
      for (int t = 0; t < Tiles; t++) {
        mma_bf16(sums[t][2 * n], rows[t], first);
        mma_bf16(sums[t][2 * n + 1], rows[t], second);
      }
    }
  }
}

// Rounds 16 rows of sums, times a factor for row lane / 4 and one for the row 8 below, and stores the first `rows` of them (stride in
// elements) with 16 bytes an access, by way of 16 rows of a tile that no other warp uses.
template <int HeadDim>
__device__ __forceinline__ void store_rows(bf16* to, size_t stride, int rows, const float (&sums)[HeadDim / 8][4], float upper, float lower,
                                           int tile, int lane) {
  const int row = lane >> 2, column = tile + (lane & 3) * 4;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < HeadDim / 8; n++) {
    *reinterpret_cast<uint32_t*>(dynamic_shared + chunk_offset<HeadDim>(row, n) + column) = pack2(sums[n][0] * upper, sums[n][1] * upper);
    *reinterpret_cast<uint32_t*>(dynamic_shared + chunk_offset<HeadDim>(row + 8, n) + column) = pack2(sums[n][2] * lower, sums[n][3] * lower);
  }
  __syncwarp();
  constexpr int Chunks = HeadDim / 8;
#pragma unroll
  for (int i = 0; i < Chunks / 2; i++) {
    const int r = (i * 32 + lane) / Chunks, chunk = (i * 32 + lane) % Chunks;
    if (r < rows) {
      *reinterpret_cast<uint4*>(to + r * stride + chunk * 8) = *reinterpret_cast<const uint4*>(dynamic_shared + tile + chunk_offset<HeadDim>(r, chunk));
    }
  }
}

// The same as f32, all times one factor, from where they are.
template <int HeadDim>
__device__ __forceinline__ void store_floats(float* to, size_t stride, int rows, const float (&sums)[HeadDim / 8][4], float factor,
                                             int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = (lane >> 2) + half * 8;
    if (row >= rows) break;
    float* const at = to + row * stride + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < HeadDim / 8; n++) {
      *reinterpret_cast<float2*>(at + n * 8) = make_float2(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
    }
  }
}

// Hides the keys that row `row` and the row 8 below do not see: those behind it, those before its first. `key` is that of the lane's first
// column.
template <int Columns>
__device__ __forceinline__ void hide_keys(float (&scores)[Columns][4], int key, int row, const int (&first)[2]) {
#pragma unroll
  for (int n = 0; n < Columns; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = key + n * 8 + (i & 1);
      if (at > row + (i >> 1) * 8 || at < first[i >> 1]) scores[n][i] = -INFINITY;
    }
  }
}

// The same where rows are keys: hides the queries before them, and those behind their last.
template <int Columns>
__device__ __forceinline__ void hide_queries(float (&scores)[Columns][4], int query, int row, const int (&last)[2]) {
#pragma unroll
  for (int n = 0; n < Columns; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int at = query + n * 8 + (i & 1);
      if (at < row + (i >> 1) * 8 || at > last[i >> 1]) scores[n][i] = -INFINITY;
    }
  }
}

// Scales row lane / 4 of a tile of sums, or (`half`) the one 8 below.
template <int Columns> __device__ __forceinline__ void rescale(float (&sums)[Columns][4], int half, float factor) {
#pragma unroll
  for (int n = 0; n < Columns; n++) {
    sums[n][2 * half] *= factor;
    sums[n][2 * half + 1] *= factor;
  }
}

// The running softmax of 16·Tiles rows a warp: a lane holds the rows lane / 4 and 8 below of each tile. Maxima are of raw products (the
// scale is positive), sums are of this lane's columns alone until `total`. Where registers are short they are in shared memory: at `kept` of
// each of 128 threads, and every 128 floats from there.
template <int Tiles, bool Shared = false> struct Softmax {
  float own[Shared ? 1 : 4 * Tiles];
  volatile float* kept;

  __device__ __forceinline__ explicit Softmax(volatile float* kept = nullptr) : kept(kept) {
#pragma unroll
    for (int i = 0; i < 2 * Tiles; i++) {
      set(i, -INFINITY);
      set(2 * Tiles + i, 0.f);
    }
  }

  __device__ __forceinline__ float get(int i) const { return Shared ? kept[i * 128] : own[Shared ? 0 : i]; }
  __device__ __forceinline__ void set(int i, float x) {
    if (Shared) kept[i * 128] = x;
    else own[Shared ? 0 : i] = x;
  }
  __device__ __forceinline__ float top(int t, int half) const { return get(2 * t + half); }

  // Turns the products of a row into exp2(scale_log2 · (product − maximum)) and adds them to its sum. Returns the factor that brings what
  // was summed before to the new maximum.
  template <int Columns> __device__ __forceinline__ float weigh(float (&products)[Columns][4], int t, int half, float scale_log2) {
    const float before = top(t, half);
    float largest = before;
#pragma unroll
    for (int n = 0; n < Columns; n++) largest = fmaxf(largest, fmaxf(products[n][2 * half], products[n][2 * half + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    // A row that has seen no key yet keeps zeros: −∞ − 0, not −∞ − −∞. Where the maximum stays, the factor is exactly 1.
    const float finite = largest == -INFINITY ? 0.f : largest, offset = finite * scale_log2;
    const float factor = exp2_approx((before - finite) * scale_log2);
    set(2 * t + half, largest);
    float part = 0.f;
#pragma unroll
    for (int n = 0; n < Columns; n++) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) {
        products[n][i] = exp2_approx(products[n][i] * scale_log2 - offset);
        part += products[n][i];
      }
    }
    set(2 * (Tiles + t) + half, get(2 * (Tiles + t) + half) * factor + part);
    return factor;
  }

  // The same for all rows, whose outputs so far are scaled.
  template <int Columns, int Outputs>
  __device__ __forceinline__ void update(float (&products)[Tiles][Columns][4], float (&outputs)[Tiles][Outputs][4], float scale_log2) {
#pragma unroll
    for (int t = 0; t < Tiles; t++) {
#pragma unroll
      for (int half = 0; half < 2; half++) rescale(outputs[t], half, weigh(products[t], t, half, scale_log2));
    }
  }

  // The sum of a row over all its columns.
  __device__ __forceinline__ float total(int t, int half) const {
    float x = get(2 * (Tiles + t) + half);
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }
};

// Stores the first `rows` of the 16 rows of tile t: outputs divided by their sums, as store_rows does, and the log-sum-exp at `lse_at`
// where it is asked for.
template <int HeadDim, int Tiles, bool Shared>
__device__ __forceinline__ void store_outputs(const Softmax<Tiles, Shared>& softmax, int t, const float (&outputs)[HeadDim / 8][4], bf16* to,
                                              size_t stride, float* lse, size_t lse_at, int rows, float scale, int tile, int lane) {
  const float upper = softmax.total(t, 0), lower = softmax.total(t, 1);
  store_rows<HeadDim>(to, stride, rows, outputs, 1.f / upper, 1.f / lower, tile, lane);
  const int row = lane >> 2;
  if (lse == nullptr || (lane & 3) != 0) return;
  if (row < rows) lse[lse_at + row] = softmax.top(t, 0) * scale + logf(upper);
  if (row + 8 < rows) lse[lse_at + row + 8] = softmax.top(t, 1) * scale + logf(lower);
}

template <int Tiles, int Columns> __device__ __forceinline__ void clear(float (&sums)[Tiles][Columns][4]) {
#pragma unroll
  for (int t = 0; t < Tiles; t++) {
#pragma unroll
    for (int n = 0; n < Columns; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) sums[t][n][i] = 0.f;
    }
  }
}
