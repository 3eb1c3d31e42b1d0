// What the attention kernels share: which queries see which keys, tiles in shared memory, products on tensor cores,
// the softmax.
//
// Rows of a packed batch: document i holds rows starts[i] .. starts[i + 1]. Query r sees key c where both lie in one
// document, c ≤ r and c + window > r. Both bounds rise with the row, so that a tile of rows is bounded by those of
// its first and last row:
//   keys of queries a..b    first_key(a) .. b,     all of them seen by all from first_key(b) to a;
//   queries of keys a..b    a .. last_query(b),    all of them seeing all from b to last_query(a).
// One warp of a block finds these bounds for the rows of the block's tile and shares them with the rest.
// Tiles lie on a fixed grid over the packed rows. Aligning them to documents would cost a table (built, uploaded,
// kept for each batch) and saves nothing: a tile that straddles an edge runs over the keys of both documents, and two
// aligned tiles would run over the same.
//
// A tile is `rows` × HeadDim bf16 in chunks of 16 bytes, chunk c of row r at place c ^ (r & 7) of its row: eight rows
// of one chunk column, which is what ldmatrix reads and what the copies write, lie in eight different groups of four
// banks. Tiles are named by their offset in bytes (a multiple of 1024) in dynamic shared memory.
// Accumulators and scores are [columns / 8][4] a thread, as mma.sync lays them out: of 8 columns those at 2·(lane mod
// 4) and the next, in row lane / 4 (the upper half), then in the row 8 below (the lower half).
#pragma once
#include "prelude.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

struct Documents {
  const uint32_t* starts;  // count + 1
  int count;
  uint32_t window;  // UINT32_MAX where there is none

  // By a whole warp: the document that holds `row`. A step leaves one 32nd of the candidates.
  __device__ __forceinline__ int of(int row) const {
    const int lane = threadIdx.x & 31;
    int low = 0, high = count;
    while (high - low > 1) {
      const int step = (high - low + 31) / 32, probe = low + lane * step;
      const bool before = probe < high && starts[probe] <= (uint32_t)row;
      low += (__popc(__ballot_sync(0xffffffffu, before)) - 1) * step;
      high = low + step < high ? low + step : high;
    }
    return low;
  }
  // The first key that query `row` of a document that begins at `start` sees.
  __device__ __forceinline__ int first_key(int row, int start) const {
    const uint32_t before = (uint32_t)row < window ? 0u : (uint32_t)row - window + 1u;
    return (int)before > start ? (int)before : start;
  }
  // The last query that sees key `row` of a document that ends before `end`.
  __device__ __forceinline__ int last_query(int row, int end) const {
    return window < (uint32_t)(end - row) ? row + (int)window - 1 : end - 1;
  }
  // The same for any row, by a whole warp.
  __device__ __forceinline__ int first_key(int row) const { return first_key(row, (int)starts[of(row)]); }
  __device__ __forceinline__ int last_query(int row) const { return last_query(row, (int)starts[of(row) + 1]); }

  // By a whole warp: bounds[i] = bound(row, start, end) of row first_row + i and its document, for `Rows` rows; rows
  // behind `last_row` repeat its bound. A barrier must follow before other warps read them.
  template <int Rows, class Bound>
  __device__ __forceinline__ void find_bounds(int* bounds, int first_row, int last_row, Bound bound) const {
    const int tile_end = first_row + Rows;
    int row = first_row + (threadIdx.x & 31);
    for (int document = of(first_row);; document++) {
      const int start = (int)starts[document], end = (int)starts[document + 1];
      const int until = end > last_row ? tile_end : end;
#pragma unroll 1
      for (; row < until; row += 32) bounds[row - first_row] = bound(row < last_row ? row : last_row, start, end);
      if (until == tile_end) return;
    }
  }
  template <int Rows>
  __device__ __forceinline__ void find_first_keys(int* first_keys, int first_row, int last_row) const {
    find_bounds<Rows>(first_keys, first_row, last_row, [&](int row, int start, int) { return first_key(row, start); });
  }
  template <int Rows>
  __device__ __forceinline__ void find_last_queries(int* last_queries, int first_row, int last_row) const {
    find_bounds<Rows>(last_queries, first_row, last_row, [&](int row, int, int end) { return last_query(row, end); });
  }
};

// Keys of a chunk of the decode form. A constant, so that an answer does not depend on what else is decoded in the
// same step.
constexpr int DECODE_KEYS = 256;

// The keys of one chunk of a span (start, length) of which the last `window` are seen.
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

// ---- tiles in shared memory

// Bytes from the start of a tile to its chunk.
template <int HeadDim> __device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * HeadDim * 2 + ((chunk ^ (row & 7)) << 4);
}

// Starts the copy of rows 0 .. rows of global memory to a tile; rows behind them become zeros. The first is at
// `global` + `offset`, rows are `stride` elements apart. The threads thread, thread + Threads, … of the caller share
// the work. Offsets of 32 bits, because pointers would take ten registers of the loops.
template <int HeadDim, int Rows, int Threads>
__device__ __forceinline__ void cp_async_tile(int tile, const bf16* global, uint32_t offset, uint32_t stride, int rows,
                                              int thread) {
  constexpr int Chunks = HeadDim / 8, Step = Threads / Chunks;
  static_assert(Rows % Step == 0, "no tail");
  const int first = thread / Chunks, chunk = thread % Chunks;
#pragma unroll
  for (int i = 0; i < Rows / Step; i++) {
    const int row = first + i * Step;
    const bool inside = row < rows;
    const bf16* const from = global + (offset + (inside ? row : 0) * stride + chunk * 8);
    cp_async16(dynamic_shared + tile + chunk_offset<HeadDim>(row, chunk), from, inside ? 16 : 0);
  }
}

// Offset of a lane's row for ldmatrix of 16 rows × 16 columns, as A operand, or transposed as B operand of two n8
// tiles. Columns 16·i are at offset ^ (i << 5).
template <int HeadDim> __device__ __forceinline__ int ldmatrix_offset_a(int lane) {
  return chunk_offset<HeadDim>(lane & 15, lane >> 4);
}
// The same for the B operand of two n8 tiles whose columns are the tile's rows.
template <int HeadDim> __device__ __forceinline__ int ldmatrix_offset_b(int lane) {
  return chunk_offset<HeadDim>((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
}

// ---- products of a warp: 16·Tiles rows of A

template <int Tiles, int Columns> __device__ __forceinline__ void zero(float (&acc)[Tiles][Columns][4]) {
#pragma unroll
  for (int t = 0; t < Tiles; t++) {
#pragma unroll
    for (int n = 0; n < Columns; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) acc[t][n][i] = 0.f;
    }
  }
}

// acc[t][n] += A · Bᵀ over 16 columns of A and B: `b` is the offset of the caller's ldmatrix_offset_b in the first 16
// rows of B.
template <int HeadDim, int Tiles, int Columns>
__device__ __forceinline__ void mma_ABt_k16(float (&acc)[Tiles][Columns][4], const uint32_t (&a)[Tiles][4], int b) {
#pragma unroll
  for (int n = 0; n < Columns; n += 2) {
    uint32_t pair[4];
    ldmatrix_x4(pair, dynamic_shared + n * 8 * HeadDim * 2 + b);
    const uint32_t first[2] = {pair[0], pair[1]}, second[2] = {pair[2], pair[3]};
#pragma unroll
    for (int t = 0; t < Tiles; t++) {
      mma_bf16(acc[t][n], a[t], first);
      mma_bf16(acc[t][n + 1], a[t], second);
    }
  }
}

// acc[t][n] += A · Bᵀ for rows of A that begin at offset `a`, and 8·Columns rows of B that begin at offset `b`.
template <int HeadDim, int Tiles, int Columns>
__device__ __forceinline__ void mma_ABt(float (&acc)[Tiles][Columns][4], int a, int b, int lane) {
  a += ldmatrix_offset_a<HeadDim>(lane);
  b += ldmatrix_offset_b<HeadDim>(lane);
#pragma unroll(2)
  for (int k = 0; k < HeadDim / 16; k++) {
    uint32_t operand[Tiles][4];
#pragma unroll
    for (int t = 0; t < Tiles; t++) ldmatrix_x4(operand[t], dynamic_shared + t * 16 * HeadDim * 2 + (a ^ k << 5));
    mma_ABt_k16<HeadDim>(acc, operand, b ^ k << 5);
  }
}

// The A operand of columns 16·k .. of an accumulator, rounded to bf16.
template <int Columns>
__device__ __forceinline__ void to_operand(uint32_t (&operand)[4], const float (&acc)[Columns][4], int k) {
  operand[0] = pack2(acc[2 * k][0], acc[2 * k][1]);
  operand[1] = pack2(acc[2 * k][2], acc[2 * k][3]);
  operand[2] = pack2(acc[2 * k + 1][0], acc[2 * k + 1][1]);
  operand[3] = pack2(acc[2 * k + 1][2], acc[2 * k + 1][3]);
}

// acc[t][n] += A · B: A from registers (P or dS), rounded to bf16; B 8·Columns rows, which begin at offset `b`.
template <int HeadDim, int Tiles, int Columns>
__device__ __forceinline__ void mma_AB(float (&acc)[Tiles][HeadDim / 8][4], const float (&a)[Tiles][Columns][4], int b,
                                       int lane) {
  b += ldmatrix_offset_a<HeadDim>(lane);
#pragma unroll
  for (int k = 0; k < Columns / 2; k++) {
    uint32_t operand[Tiles][4];
#pragma unroll
    for (int t = 0; t < Tiles; t++) to_operand(operand[t], a[t], k);
#pragma unroll
    for (int n = 0; n < HeadDim / 16; n++) {
      uint32_t pair[4];
      ldmatrix_x4_trans(pair, dynamic_shared + k * 16 * HeadDim * 2 + (b ^ n << 5));
      const uint32_t first[2] = {pair[0], pair[1]}, second[2] = {pair[2], pair[3]};
#pragma unroll
      for (int t = 0; t < Tiles; t++) {
        mma_bf16(acc[t][2 * n], operand[t], first);
        mma_bf16(acc[t][2 * n + 1], operand[t], second);
      }
    }
  }
}

// ---- masks and softmax

// Masks the keys that row `row` and the row 8 below do not see: those behind it, those before its first. `key` is
// that of the lane's first column.
template <int Columns>
__device__ __forceinline__ void mask_keys(float (&scores)[Columns][4], int key, int row, const int (&first)[2],
                                          float masked = -INFINITY) {
#pragma unroll
  for (int n = 0; n < Columns; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = key + n * 8 + (i & 1);
      if (column > row + (i >> 1) * 8 || column < first[i >> 1]) scores[n][i] = masked;
    }
  }
}

// The same where rows are keys: masks the queries before them, and those behind their last.
template <int Columns>
__device__ __forceinline__ void mask_queries(float (&scores)[Columns][4], int query, int row, const int (&last)[2],
                                             float masked = -INFINITY) {
#pragma unroll
  for (int n = 0; n < Columns; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int column = query + n * 8 + (i & 1);
      if (column < row + (i >> 1) * 8 || column > last[i >> 1]) scores[n][i] = masked;
    }
  }
}

// Scales the upper or the lower half of an accumulator's rows.
template <int Columns> __device__ __forceinline__ void rescale(float (&acc)[Columns][4], int half, float factor) {
#pragma unroll
  for (int n = 0; n < Columns; n++) {
    acc[n][2 * half] *= factor;
    acc[n][2 * half + 1] *= factor;
  }
}

// The online softmax of 16·Tiles rows a warp: a lane holds the row_max and row_sum of the rows lane / 4 and 8 below
// of each tile. Maxima are of raw scores (the scale is positive), sums are of this lane's columns alone until
// `total`. Where registers are short they are in shared memory: at `shared` of each of 128 threads, and every 128
// floats from there.
template <int Tiles, bool Shared = false> struct Softmax {
  float registers[Shared ? 1 : 4 * Tiles];
  volatile float* shared;

  __device__ __forceinline__ explicit Softmax(volatile float* shared = nullptr) : shared(shared) { reset(); }
  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int i = 0; i < 2 * Tiles; i++) {
      set(i, -INFINITY);
      set(2 * Tiles + i, 0.f);
    }
  }

  __device__ __forceinline__ float get(int i) const { return Shared ? shared[i * 128] : registers[Shared ? 0 : i]; }
  __device__ __forceinline__ void set(int i, float x) {
    if (Shared) shared[i * 128] = x;
    else registers[Shared ? 0 : i] = x;
  }
  __device__ __forceinline__ float row_max(int t, int half) const { return get(2 * t + half); }
  __device__ __forceinline__ float row_sum(int t, int half) const { return get(2 * (Tiles + t) + half); }

  // Turns the scores of a row into exp2(scale_log2 · (score − row_max)) and adds them to its sum. Returns the factor
  // that brings what was summed before to the new maximum.
  template <int Columns>
  __device__ __forceinline__ float exponentials(float (&scores)[Columns][4], int t, int half, float scale_log2) {
    const float before = row_max(t, half);
    float largest = before;
#pragma unroll
    for (int n = 0; n < Columns; n++) largest = fmaxf(largest, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    // A row that has seen no key yet keeps zeros: −∞ − 0, not −∞ − −∞. Where the maximum stays, the factor is exactly
    // 1.
    const float finite = largest == -INFINITY ? 0.f : largest, offset = finite * scale_log2;
    const float factor = exp2_approx((before - finite) * scale_log2);
    set(2 * t + half, largest);
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < Columns; n++) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; i++) {
        scores[n][i] = exp2_approx(scores[n][i] * scale_log2 - offset);
        sum += scores[n][i];
      }
    }
    set(2 * (Tiles + t) + half, row_sum(t, half) * factor + sum);
    return factor;
  }

  // The same for all rows, whose outputs so far are rescaled.
  template <int Columns, int Outputs>
  __device__ __forceinline__ void update(float (&scores)[Tiles][Columns][4], float (&o_acc)[Tiles][Outputs][4],
                                         float scale_log2) {
#pragma unroll
    for (int t = 0; t < Tiles; t++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        rescale(o_acc[t], half, exponentials(scores[t], t, half, scale_log2));
      }
    }
  }

  // The sum of a row over all its columns.
  __device__ __forceinline__ float total(int t, int half) const {
    float x = row_sum(t, half);
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  // Stores the natural log-sum-exp of the first `rows` of the 16 rows of tile t, whose sums are these totals.
  __device__ __forceinline__ void store_lse(float* lse, int t, int rows, float scale, float upper, float lower,
                                            int lane) const {
    const int row = lane >> 2;
    if ((lane & 3) != 0) return;
    if (row < rows) lse[row] = row_max(t, 0) * scale + logf(upper);
    if (row + 8 < rows) lse[row + 8] = row_max(t, 1) * scale + logf(lower);
  }
};

// ---- softmax, backward

// P from scores: exp2(scale_log2 · score − lse(n, i)), where lse(n, i) is that of the query of scores[n][i], times
// log2 e.
template <int Columns, class Lse>
__device__ __forceinline__ void recompute_p(float (&scores)[Columns][4], float scale_log2, Lse lse) {
#pragma unroll
  for (int n = 0; n < Columns; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) scores[n][i] = exp2_approx(scores[n][i] * scale_log2 - lse(n, i));
  }
}

// dS from dP: P∘(dP − delta), delta(n, i) likewise.
template <int Columns, class Delta>
__device__ __forceinline__ void softmax_backward(float (&dp)[Columns][4], const float (&p)[Columns][4], Delta delta) {
#pragma unroll
  for (int n = 0; n < Columns; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) dp[n][i] = p[n][i] * (dp[n][i] - delta(n, i));
  }
}

// The query heads whose shares of dK and dV one of `parts` blocks adds up: those of a group, evenly.
struct HeadRange {
  int kv_head, part, first, count;

  __device__ __forceinline__ HeadRange(int block, int parts, int heads, int kv_heads)
      : kv_head(block / parts), part(block % parts) {
    const int group = heads / kv_heads, share = (group + parts - 1) / parts;
    first = kv_head * group + part * share;
    count = group - part * share < share ? group - part * share : share;
  }
};

// ---- results

// Rounds 16 rows of an accumulator, the upper and the lower half times a factor each, and stores the first `rows` of
// them (stride in elements) with 16 bytes an access, by way of 16 rows of a tile that no other warp uses.
template <int HeadDim>
__device__ __forceinline__ void store_rows(bf16* to, size_t stride, int rows, const float (&acc)[HeadDim / 8][4],
                                           float upper, float lower, int tile, int lane) {
  constexpr int Chunks = HeadDim / 8;
  const int row = lane >> 2, column = tile + (lane & 3) * 4;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < Chunks; n++) {
    const auto place = [&](int r) {
      return reinterpret_cast<uint32_t*>(dynamic_shared + column + chunk_offset<HeadDim>(r, n));
    };
    *place(row) = pack2(acc[n][0] * upper, acc[n][1] * upper);
    *place(row + 8) = pack2(acc[n][2] * lower, acc[n][3] * lower);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Chunks / 2; i++) {
    const int r = (i * 32 + lane) / Chunks, chunk = (i * 32 + lane) % Chunks;
    const uint4 bits = *reinterpret_cast<const uint4*>(dynamic_shared + tile + chunk_offset<HeadDim>(r, chunk));
    if (r < rows) *reinterpret_cast<uint4*>(to + r * stride + chunk * 8) = bits;
  }
}

// The same as f32, all times one factor, straight from the registers.
template <int HeadDim>
__device__ __forceinline__ void store_rows_f32(float* to, size_t stride, int rows, const float (&acc)[HeadDim / 8][4],
                                               float factor, int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = (lane >> 2) + half * 8;
    if (row >= rows) break;
    float* const place = to + row * stride + (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < HeadDim / 8; n++) {
      *reinterpret_cast<float2*>(place + n * 8) = make_float2(acc[n][2 * half] * factor, acc[n][2 * half + 1] * factor);
    }
  }
}
