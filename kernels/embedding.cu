// Rows of a table [table_rows, width], chosen by `rows` [count]:
//   gather: to[i] = from[rows[i]];  scatter: to[rows[i]] = from[i], rows distinct;
//   backward: dtable[rows[i]] += Σ dy[i] over equal rows, dtable f32 or bf16, summed in f32 and rounded once.
// Activations bf16. A row outside the table is skipped.
//
//   kernel                       bytes                                 at 8192 × 3584 (Qwen2.5-7B), 3.0 TB/s
//   embedding_gather_*           4 an element                          39 µs
//   embedding_scatter_*          4 an element                          39 µs
//   embedding_backward_*         2 an element of dy, 8 (f32) or        20 µs + 48 µs for 5000 distinct rows
//                                4 an element of a distinct row
//   embedding_link_*             4 a table row, about 70 an index      under 2 µs of memory; 4 launches and 2 clears
//
// Backward without float atomics: the indices are sorted by row with integer atomics, whose results do not show the
// order in which they happened. count: each index takes a place among its equals, which counts the row. allot: the
// index in place 0 takes a range of the list for its row, and enters the row with the short or the long ones (over
// LONG indices). fill: each index goes into the range, by its place. sort: each index counts the smaller ones of its
// range: that is its rank. The range and its order within are then the same in every run; where the range lies is
// not, and does not matter. The cost is linear in count and table rows, but for sort: Σ n² over rows of n equals,
// which all read the same n words (8192 equal indices: 67 million cached reads). Then a warp adds 256 columns of a
// short row in ascending order of i; of a long row, 32 warps add the indices 32 apart, and the 32 sums are added in
// order.
//
// Versions: baseline, any width and alignment (gather and scatter: an element a thread; backward: a block an index,
// which does nothing where an earlier index has the same row, and else looks for the later ones: count² / 2
// comparisons, but a single launch: wins for a few indices). vec8: 16 bytes a thread and access: width a multiple of
// 8, everything aligned to 16 bytes.
#include "prelude.cuh"

constexpr int BLOCK = 256;
// Vectors of a thread of gather and scatter.
constexpr int VECTORS = 4;
// Most indices of a row that warps sum; more are a block's.
constexpr uint32_t LONG = 64;
// Warps of that block.
constexpr int LONG_WARPS = 32;
// Rows under way at once in a thread's sum.
constexpr int AHEAD = 4;
// The place of an index whose row is outside the table.
constexpr uint32_t NOWHERE = 0xffffffffu;

// ---- gather, scatter

// grid: ceil(count · width / 256), block: 256, no shared memory
// scatter 0: to[i] = from[rows[i]], else to[rows[i]] = from[i]
extern "C" __global__ void __launch_bounds__(BLOCK)
    embedding_move_baseline_bf16(const bf16* __restrict__ from, const uint32_t* __restrict__ rows,
                                 bf16* __restrict__ to, uint64_t count, uint32_t table_rows, uint32_t width,
                                 uint32_t scatter) {
  const uint64_t element = (uint64_t)blockIdx.x * BLOCK + threadIdx.x, i = element / width;
  if (i >= count || rows[i] >= table_rows) return;
  const uint64_t in_table = (uint64_t)rows[i] * width + element % width;
  to[scatter ? in_table : element] = from[scatter ? element : in_table];
}
EXPORT(embedding_move_baseline_bf16)

// grid: ceil(count · width / 8 / 1024), block: 256, no shared memory
// scatter: as above
extern "C" __global__ void __launch_bounds__(BLOCK)
    embedding_move_vec8_bf16(const bf16* __restrict__ from, const uint32_t* __restrict__ rows, bf16* __restrict__ to,
                             uint64_t count, uint32_t table_rows, uint32_t width, uint32_t scatter) {
  const uint32_t vectors = width / 8;
  uint4 v[VECTORS];
  uint64_t target[VECTORS];
  bool valid[VECTORS];
#pragma unroll
  for (int k = 0; k < VECTORS; k++) {
    const uint64_t vector = ((uint64_t)blockIdx.x * VECTORS + k) * BLOCK + threadIdx.x, i = vector / vectors;
    const uint32_t row = i < count ? rows[i] : table_rows;
    valid[k] = row < table_rows;
    const uint64_t in_table = (uint64_t)row * vectors + (uint32_t)(vector - i * vectors);
    target[k] = scatter ? in_table : vector;
    if (valid[k]) v[k] = reinterpret_cast<const uint4*>(from)[scatter ? vector : in_table];
  }
#pragma unroll
  for (int k = 0; k < VECTORS; k++) {
    if (valid[k]) reinterpret_cast<uint4*>(to)[target[k]] = v[k];
  }
}
EXPORT(embedding_move_vec8_bf16)

// ---- backward: which indices have the same row

// A row with its range of the sorted list.
struct Run {
  uint32_t row, start, length;
};

// The short rows, the long ones, and the indices placed so far.
struct Totals {
  uint32_t short_runs, long_runs, placed;
};

// grid: ceil(count / 256), block: 256, no shared memory
// counts [table_rows] and totals begin as zeros
extern "C" __global__ void __launch_bounds__(BLOCK)
    embedding_link_count(const uint32_t* __restrict__ rows, uint32_t* __restrict__ counts,
                         uint32_t* __restrict__ places, uint32_t count, uint32_t table_rows) {
  const uint32_t i = blockIdx.x * BLOCK + threadIdx.x;
  if (i < count) places[i] = rows[i] < table_rows ? atomicAdd(counts + rows[i], 1u) : NOWHERE;
}
EXPORT(embedding_link_count)

// grid: ceil(count / 256), block: 256, no shared memory
// runs [count] from the front for short rows, from the back for long ones
extern "C" __global__ void __launch_bounds__(BLOCK)
    embedding_link_allot(const uint32_t* __restrict__ rows, const uint32_t* __restrict__ counts,
                         const uint32_t* __restrict__ places, uint32_t* __restrict__ starts, Run* __restrict__ runs,
                         Totals* __restrict__ totals, uint32_t count) {
  const uint32_t i = blockIdx.x * BLOCK + threadIdx.x;
  if (i >= count || places[i] != 0) return;
  const uint32_t length = counts[rows[i]], start = atomicAdd(&totals->placed, length);
  starts[rows[i]] = start;
  const uint32_t run =
      length > LONG ? count - 1 - atomicAdd(&totals->long_runs, 1u) : atomicAdd(&totals->short_runs, 1u);
  runs[run] = Run{rows[i], start, length};
}
EXPORT(embedding_link_allot)

// grid: ceil(count / 256), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(BLOCK)
    embedding_link_fill(const uint32_t* __restrict__ rows, const uint32_t* __restrict__ starts,
                        const uint32_t* __restrict__ places, uint32_t* __restrict__ unsorted, uint32_t count) {
  const uint32_t i = blockIdx.x * BLOCK + threadIdx.x;
  if (i < count && places[i] != NOWHERE) unsorted[starts[rows[i]] + places[i]] = i;
}
EXPORT(embedding_link_fill)

// grid: ceil(count / 256), block: 256, no shared memory
extern "C" __global__ void __launch_bounds__(BLOCK)
    embedding_link_sort(const uint32_t* __restrict__ rows, const uint32_t* __restrict__ counts,
                        const uint32_t* __restrict__ starts, const uint32_t* __restrict__ places,
                        const uint32_t* __restrict__ unsorted, uint32_t* __restrict__ sorted, uint32_t count) {
  const uint32_t i = blockIdx.x * BLOCK + threadIdx.x;
  if (i >= count || places[i] == NOWHERE) return;
  const uint32_t start = starts[rows[i]], length = counts[rows[i]];
  uint32_t rank = 0;
#pragma unroll 8
  for (uint32_t k = 0; k < length; k++) rank += unsorted[start + k] < i;
  sorted[start + rank] = i;
}
EXPORT(embedding_link_sort)

// ---- backward: the sums

__device__ __forceinline__ void add8_to(float* to, const float (&x)[8]) {
  float4* halves = reinterpret_cast<float4*>(to);
  const float4 a = halves[0], b = halves[1];
  halves[0] = make_float4(a.x + x[0], a.y + x[1], a.z + x[2], a.w + x[3]);
  halves[1] = make_float4(b.x + x[4], b.y + x[5], b.z + x[6], b.w + x[7]);
}
__device__ __forceinline__ void add8_to(bf16* to, const float (&x)[8]) {
  float old[8];
  unpack8(*reinterpret_cast<uint4*>(to), old);
#pragma unroll
  for (int j = 0; j < 8; j++) old[j] += x[j];
  *reinterpret_cast<uint4*>(to) = pack8(old);
}

template <class Grad>
__device__ __forceinline__ void backward_baseline(const bf16* __restrict__ dy, const uint32_t* __restrict__ rows,
                                                  Grad* __restrict__ dtable, uint32_t count, uint32_t table_rows,
                                                  uint32_t width) {
  __shared__ uint32_t seen;
  const uint32_t first = blockIdx.x, row = rows[first];
  if (row >= table_rows) return;
  if (threadIdx.x == 0) seen = 0;
  __syncthreads();
  for (uint32_t i = threadIdx.x; i < first; i += BLOCK) {
    if (rows[i] == row) atomicOr(&seen, 1u);
  }
  __syncthreads();
  if (seen) return;
  for (uint32_t column = threadIdx.x; column < width; column += BLOCK) {
    float sum = 0.f;
    for (uint32_t i = first; i < count; i++) {
      if (rows[i] == row) sum += __bfloat162float(dy[(uint64_t)i * width + column]);
    }
    Grad& element = dtable[(uint64_t)row * width + column];
    from_float(element, to_float(element) + sum);
  }
}

// sums += the vectors `column` of the rows list[from], list[from + step], … below `end`, in that order.
__device__ __forceinline__ void add_rows(float (&sums)[8], const uint4* __restrict__ dy,
                                         const uint32_t* __restrict__ list, uint32_t from, uint32_t end,
                                         uint32_t step, uint32_t vectors, uint32_t column) {
  for (uint32_t k = from; k < end; k += AHEAD * step) {
    uint4 v[AHEAD];
#pragma unroll
    for (uint32_t a = 0; a < AHEAD; a++) {
      const uint32_t i = k + a * step;
      v[a] = i < end ? dy[(uint64_t)list[i] * vectors + column] : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (uint32_t a = 0; a < AHEAD; a++) {
      float x[8];
      unpack8(v[a], x);
#pragma unroll
      for (int j = 0; j < 8; j++) sums[j] += x[j];
    }
  }
}

template <class Grad>
__device__ __forceinline__ void add_short(const bf16* __restrict__ dy, const uint32_t* __restrict__ sorted,
                                          const Run* __restrict__ runs, const Totals* __restrict__ totals,
                                          Grad* __restrict__ dtable, uint32_t width) {
  const uint32_t vectors = width / 8, chunks = (vectors + 31) / 32, lane = threadIdx.x & 31;
  const uint64_t tasks = (uint64_t)totals->short_runs * chunks, warps = (uint64_t)gridDim.x * (BLOCK / 32);
  for (uint64_t task = (uint64_t)blockIdx.x * (BLOCK / 32) + threadIdx.x / 32; task < tasks; task += warps) {
    const Run run = runs[task / chunks];
    const uint32_t column = (uint32_t)(task % chunks) * 32 + lane;
    if (column >= vectors) continue;
    float sums[8] = {};
    add_rows(sums, reinterpret_cast<const uint4*>(dy), sorted, run.start, run.start + run.length, 1, vectors, column);
    add8_to(dtable + (uint64_t)run.row * width + column * 8, sums);
  }
}

template <class Grad>
__device__ __forceinline__ void add_long(const bf16* __restrict__ dy, const uint32_t* __restrict__ sorted,
                                         const Run* __restrict__ runs, const Totals* __restrict__ totals,
                                         Grad* __restrict__ dtable, uint32_t count, uint32_t width) {
  __shared__ float parts[LONG_WARPS][256];
  const uint32_t vectors = width / 8, chunks = (vectors + 31) / 32, lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const uint64_t tasks = (uint64_t)totals->long_runs * chunks;
  for (uint64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const Run run = runs[count - 1 - task / chunks];
    const uint32_t chunk = (uint32_t)(task % chunks), column = chunk * 32 + lane;
    float sums[8] = {};
    if (column < vectors) {
      add_rows(sums, reinterpret_cast<const uint4*>(dy), sorted, run.start + warp, run.start + run.length, LONG_WARPS,
               vectors, column);
    }
    // Lane by lane within each of the eight, so that the 32 lanes write 32 banks.
#pragma unroll
    for (int j = 0; j < 8; j++) parts[warp][j * 32 + lane] = sums[j];
    __syncthreads();
    const uint32_t element = chunk * 256 + lane * 8 + warp;
    if (warp < 8 && element < width) {
      float sum = 0.f;
      for (int w = 0; w < LONG_WARPS; w++) sum += parts[w][warp * 32 + lane];
      Grad& total = dtable[(uint64_t)run.row * width + element];
      from_float(total, to_float(total) + sum);
    }
    __syncthreads();
  }
}

// baseline: grid: count, block: 256, 4 bytes of shared memory
// short: grid: any, block: 256, no shared memory; long: grid: any, block: 1024, 32 KiB of shared memory
#define BACKWARD(name, Grad)                                                                                        \
  extern "C" __global__ void __launch_bounds__(BLOCK) embedding_backward_baseline_##name(                           \
      const bf16* __restrict__ dy, const uint32_t* __restrict__ rows, Grad* __restrict__ dtable, uint32_t count,    \
      uint32_t table_rows, uint32_t width) {                                                                        \
    backward_baseline(dy, rows, dtable, count, table_rows, width);                                                  \
  }                                                                                                                 \
  EXPORT(embedding_backward_baseline_##name)                                                                        \
  extern "C" __global__ void __launch_bounds__(BLOCK) embedding_backward_short_##name(                              \
      const bf16* __restrict__ dy, const uint32_t* __restrict__ sorted, const Run* __restrict__ runs,               \
      const Totals* __restrict__ totals, Grad* __restrict__ dtable, uint32_t width) {                               \
    add_short(dy, sorted, runs, totals, dtable, width);                                                             \
  }                                                                                                                 \
  EXPORT(embedding_backward_short_##name)                                                                           \
  extern "C" __global__ void __launch_bounds__(32 * LONG_WARPS, 1) embedding_backward_long_##name(                  \
      const bf16* __restrict__ dy, const uint32_t* __restrict__ sorted, const Run* __restrict__ runs,               \
      const Totals* __restrict__ totals, Grad* __restrict__ dtable, uint32_t count, uint32_t width) {               \
    add_long(dy, sorted, runs, totals, dtable, count, width);                                                       \
  }                                                                                                                 \
  EXPORT(embedding_backward_long_##name)
BACKWARD(f32, float)
BACKWARD(bf16, bf16)
