// Cross-entropy of rows of logits, and its gradient in place in the same launch:
//   losses[row] = log Σ exp(x − top) + top − x[target],  x ← scale·(exp(x − top) / Σ − [i = target]).
// logits [rows, vocab] bf16, any vocab, aligned to 2 bytes; targets [rows], where 2³² − 1 carries no loss: loss 0,
// gradient 0. losses [rows] f32. f32 inside, one rounding a gradient. A target outside the vocabulary makes its row
// NaN. −∞ is allowed in a row with anything finite; NaN and +∞ make the row NaN. Large finite logits do not: the
// largest is subtracted first.
//
// With terms (arXiv 2406.05946, and a teacher's distribution over a few tokens), a row's gradient is
//   scale·(w·(exp(x − top) / Σ − [i = target]) + distil·(Σ p·exp(x − top) / Σ − p[i])),
//   w = 2 / (1 + exp(beta·(reference − loss)));
// a thread holds the logit of one of the teacher's tokens, and writes its gradient behind the others. Its own kernel,
// so that the registers of the others stay. An id outside the vocabulary makes its row NaN.
//
//   kernel                        bytes an element   FLOPs   at 2048 × 151936 (Qwen2.5), 3.0 TB/s
//   cross_entropy_loss_*          2                  4       207 µs
//   cross_entropy_backward_*      4                  7       415 µs
//   cross_entropy_terms_*         4                  7       415 µs, and 8 bytes a row and a teacher's token
//
// One pass finds the largest and the sum of exponentials together: each thread rescales its sum when its largest
// grows. Order of the sum: a thread over its elements (vectors t, t + 512, … two at a time, then the ragged ends),
// then the lanes, then the warps; it depends on the vocabulary and on where the row starts, modulo 16 bytes, alone.
//
// Versions: baseline, scalar, three passes. vec8: 16-byte accesses; a row may start anywhere, its ragged ends (at
// most 7 elements each) go to the first threads. The loss streams through registers, 4 loads in flight a thread. The
// backward pass keeps the head of the row in `cached` vectors of shared memory, where 4 groups of 2 asynchronous
// copies a thread are in flight; the rest is read twice, the second time from the L2 cache: at 151936 and 224 KiB
// cached, 132 rows leave 10 MB to it. Every thread touches only what it copied itself, so that there is no barrier
// but those of the sums. 16-byte accesses of consecutive lanes: no bank conflicts.
#include "prelude.cuh"

constexpr int BLOCK = 256;
constexpr int THREADS = 512;
// Vectors of a thread that one rescaling serves, and the span of a block's step in vectors.
constexpr int STEP = 2, SPAN = STEP * THREADS;
// Groups of asynchronous copies in flight.
constexpr int DEPTH = 4;
constexpr uint32_t IGNORE = 0xffffffffu;
constexpr float LOWEST = -3.4028234663852886e38f, LOG2E = 1.4426950408889634f;

// exp(x − top). The difference comes first: a product of a large x with log₂e may overflow.
__device__ __forceinline__ float shifted_exp(float x, float top) { return exp2_approx((x - top) * LOG2E); }

// Largest and Σ exp(x − largest) of what it has seen. It starts at the lowest finite number, so that −∞ counts as 0
// and no difference is ∞ − ∞.
struct Online {
  float top = LOWEST, sum = 0.f;

  template <int Count> __device__ __forceinline__ void add(const float (&x)[Count]) {
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < Count; i++) largest = fmaxf(largest, x[i]);
    if (largest > top) {
      sum *= shifted_exp(top, largest);
      top = largest;
    }
#pragma unroll
    for (int i = 0; i < Count; i++) sum += shifted_exp(x[i], top);
  }
  template <int Count> __device__ __forceinline__ void add_vectors(const uint4 (&bits)[Count]) {
    float x[Count * 8];
#pragma unroll
    for (int v = 0; v < Count; v++) unpack8(bits[v], reinterpret_cast<float (&)[8]>(x[8 * v]));
    add(x);
  }
  // Every thread of the block gets the block's.
  template <int Threads> __device__ __forceinline__ void merge() {
    const float largest = block_max<Threads>(top);
    sum = block_sum<Threads>(sum * shifted_exp(top, largest));
    top = largest;
  }
};

// A row, cut into what comes before the first multiple of 16 bytes, whole vectors, and what is left.
struct Row {
  bf16* elements;
  uint32_t head, vectors, vocab;

  __device__ __forceinline__ Row(bf16* logits, uint32_t row, uint32_t vocab)
      : elements(logits + (uint64_t)row * vocab), vocab(vocab) {
    head = min((uint32_t)(16 - (reinterpret_cast<uintptr_t>(elements) & 15)) % 16 / 2, vocab);
    vectors = (vocab - head) / 8;
  }
  __device__ __forceinline__ uint4* body() const { return reinterpret_cast<uint4*>(elements + head); }
  // Elements outside the vectors: at most 14.
  __device__ __forceinline__ uint32_t ragged() const { return vocab - vectors * 8; }
  __device__ __forceinline__ uint32_t ragged_index(uint32_t i) const { return i < head ? i : i + vectors * 8; }
};

// NaN where the target is outside the vocabulary.
__device__ __forceinline__ float target_logit(const Row& row, uint32_t target) {
  return target < row.vocab ? __bfloat162float(row.elements[target]) : __uint_as_float(0x7fc00000u);
}

__device__ __forceinline__ float loss_of(const Online& all, float chosen) {
  return logf(all.sum) + (all.top - chosen);
}

// Terms of the loss beside the cross-entropy: [rows] reference and beta, [rows, width] ids and probs.
struct Terms {
  const float* reference;
  const float* beta;
  const uint32_t* ids;
  const float* probs;
  uint32_t width;
  float distil;
};

// One of the teacher's tokens of a row, read where it is needed: registers are scarce.
struct TeacherToken {
  uint32_t id = 0;
  float p = 0.f;

  __device__ __forceinline__ explicit TeacherToken(const Terms& terms) {
    if (threadIdx.x < terms.width) {
      const uint64_t at = (uint64_t)blockIdx.x * terms.width + threadIdx.x;
      id = terms.ids[at];
      p = terms.probs[at];
    }
  }
};

// The logit of a thread's token of the teacher, and the sum of the row's probabilities.
struct TeacherRow {
  float logit = 0.f, sum = 0.f;

  __device__ __forceinline__ TeacherRow() {}
  __device__ __forceinline__ TeacherRow(const Terms& terms, const Row& row) {
    const TeacherToken token(terms);
    if (token.p != 0.f) logit = target_logit(row, token.id);
    const bool known = token.id < row.vocab || token.p == 0.f;
    sum = block_sum<THREADS>(known ? token.p : __uint_as_float(0x7fc00000u), 1);
  }
};

// scale·softmax is factor·exp(x − top); NaN in all of it where the target is outside.
__device__ __forceinline__ float factor_of(const Online& all, float scale, bool inside) {
  return inside ? scale / all.sum : __uint_as_float(0x7fc00000u);
}
__device__ __forceinline__ float gradient(float x, const Online& all, float factor, float scale, bool chosen) {
  return fmaf(shifted_exp(x, all.top), factor, chosen ? -scale : 0.f);
}

// grid: rows, block: 256, 384 bytes of shared memory
// with_gradient 0: the logits stay as they are
extern "C" __global__ void __launch_bounds__(BLOCK)
    cross_entropy_baseline_bf16(bf16* __restrict__ logits, const uint32_t* __restrict__ targets,
                                float* __restrict__ losses, uint32_t vocab, float scale, uint32_t with_gradient) {
  const Row row(logits, blockIdx.x, vocab);
  const uint32_t target = targets[blockIdx.x];
  if (target == IGNORE) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0.f;
    for (uint32_t i = threadIdx.x; with_gradient && i < vocab; i += BLOCK) row.elements[i] = __float2bfloat16(0.f);
    return;
  }
  Online all;
  for (uint32_t i = threadIdx.x; i < vocab; i += BLOCK) all.top = fmaxf(all.top, __bfloat162float(row.elements[i]));
  all.top = block_max<BLOCK>(all.top);
  for (uint32_t i = threadIdx.x; i < vocab; i += BLOCK) {
    all.sum += shifted_exp(__bfloat162float(row.elements[i]), all.top);
  }
  const float chosen = target_logit(row, target);
  all.sum = block_sum<BLOCK>(all.sum);
  if (threadIdx.x == 0) losses[blockIdx.x] = loss_of(all, chosen);
  if (!with_gradient) return;
  const float factor = factor_of(all, scale, target < vocab);
  for (uint32_t i = threadIdx.x; i < vocab; i += BLOCK) {
    const float x = __bfloat162float(row.elements[i]);
    row.elements[i] = __float2bfloat16(gradient(x, all, factor, scale, i == target));
  }
}
EXPORT(cross_entropy_baseline_bf16)

// Adds the vectors [first, row.vectors), a multiple of SPAN first, and the ragged ends.
__device__ __forceinline__ void add_rest(Online& mine, const Row& row, uint32_t first) {
  const uint4* body = row.body();
  uint32_t base = first;
  for (; base + 2 * SPAN <= row.vectors; base += 2 * SPAN) {
    uint4 v[2 * STEP];
#pragma unroll
    for (int k = 0; k < 2 * STEP; k++) v[k] = body[base + k * THREADS + threadIdx.x];
    mine.add_vectors(reinterpret_cast<const uint4 (&)[STEP]>(v[0]));
    mine.add_vectors(reinterpret_cast<const uint4 (&)[STEP]>(v[STEP]));
  }
  if (base + SPAN <= row.vectors) {
    uint4 v[STEP];
#pragma unroll
    for (int k = 0; k < STEP; k++) v[k] = body[base + k * THREADS + threadIdx.x];
    mine.add_vectors(v);
    base += SPAN;
  }
  for (uint32_t i = base + threadIdx.x; i < row.vectors; i += THREADS) {
    const uint4 v[1] = {body[i]};
    mine.add_vectors(v);
  }
  if (threadIdx.x < row.ragged()) {
    const float x[1] = {__bfloat162float(row.elements[row.ragged_index(threadIdx.x)])};
    mine.add(x);
  }
}

// grid: rows, block: 512, 384 bytes of shared memory
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    cross_entropy_loss_vec8_bf16(bf16* __restrict__ logits, const uint32_t* __restrict__ targets,
                                 float* __restrict__ losses, uint32_t vocab) {
  const Row row(logits, blockIdx.x, vocab);
  const uint32_t target = targets[blockIdx.x];
  if (target == IGNORE) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0.f;
    return;
  }
  Online all;
  add_rest(all, row, 0);
  all.merge<THREADS>();
  if (threadIdx.x == 0) losses[blockIdx.x] = loss_of(all, target_logit(row, target));
}
EXPORT(cross_entropy_loss_vec8_bf16)

// cached: vectors of a row kept in shared memory, a multiple of SPAN
template <bool WithTerms>
__device__ __forceinline__ void backward_vec8(bf16* __restrict__ logits, const uint32_t* __restrict__ targets,
    float* __restrict__ losses, uint32_t vocab, float scale, uint32_t cached, const Terms& terms) {
  const Row row(logits, blockIdx.x, vocab);
  uint4* body = row.body();
  const uint32_t target = targets[blockIdx.x];
  if (target == IGNORE) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0.f;
    for (uint32_t i = threadIdx.x; i < row.vectors; i += THREADS) store_streaming(body + i, uint4{0, 0, 0, 0});
    if (threadIdx.x < row.ragged()) row.elements[row.ragged_index(threadIdx.x)] = __float2bfloat16(0.f);
    return;
  }
  uint4* kept = reinterpret_cast<uint4*>(dynamic_shared);
  // Whole steps only: what a thread keeps is what it reads.
  const uint32_t steps = min(cached, row.vectors) / SPAN;
  const auto fetch = [&](uint32_t step) {
    if (step < steps) {
#pragma unroll
      for (int k = 0; k < STEP; k++) {
        const uint32_t i = step * SPAN + k * THREADS + threadIdx.x;
        cp_async16(kept + i, body + i);
      }
    }
    cp_async_commit();
  };
  for (uint32_t step = 0; step < DEPTH; step++) fetch(step);
  Online all;
  for (uint32_t step = 0; step < steps; step++) {
    cp_async_wait<DEPTH - 1>();
    uint4 v[STEP];
#pragma unroll
    for (int k = 0; k < STEP; k++) v[k] = kept[step * SPAN + k * THREADS + threadIdx.x];
    fetch(step + DEPTH);
    all.add_vectors(v);
  }
  add_rest(all, row, steps * SPAN);
  const float chosen = target_logit(row, target);
  const TeacherRow teacher = WithTerms ? TeacherRow(terms, row) : TeacherRow();
  // Its barriers also keep the first overwritten logit behind the last read of `chosen`.
  all.merge<THREADS>();
  const float loss = loss_of(all, chosen);
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
  const float whole = scale;
  float softmax_scale = scale;
  if (WithTerms) {
    const float beta = terms.beta[blockIdx.x], reference = terms.reference[blockIdx.x];
    const float weight = 2.f / (1.f + exp2_approx(beta * (reference - loss) * LOG2E));
    softmax_scale = scale * fmaf(terms.distil, teacher.sum, weight);
    scale *= weight;
  }
  const float factor = factor_of(all, softmax_scale, target < vocab);
  const auto replace = [&](uint32_t i, uint4 bits) {
    const uint32_t first = row.head + i * 8;
    float x[8];
    unpack8(bits, x);
#pragma unroll
    for (int j = 0; j < 8; j++) x[j] = gradient(x[j], all, factor, scale, first + j == target);
    store_streaming(body + i, pack8(x));
  };
  // Last read, first back: it is the likeliest to be in the L2 cache.
  uint32_t base = steps * SPAN;
  for (; base + 4 * THREADS <= row.vectors; base += 4 * THREADS) {
    uint4 v[4];
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = body[base + k * THREADS + threadIdx.x];
#pragma unroll
    for (int k = 0; k < 4; k++) replace(base + k * THREADS + threadIdx.x, v[k]);
  }
  for (uint32_t i = base + threadIdx.x; i < row.vectors; i += THREADS) replace(i, body[i]);
  for (uint32_t i = threadIdx.x; i < steps * SPAN; i += THREADS) replace(i, kept[i]);
  if (threadIdx.x < row.ragged()) {
    bf16* element = row.elements + row.ragged_index(threadIdx.x);
    const float x = __bfloat162float(*element);
    *element = __float2bfloat16(gradient(x, all, factor, scale, row.ragged_index(threadIdx.x) == target));
  }
  if (WithTerms) {
    __syncthreads();  // behind what other threads wrote to the same elements
    const TeacherToken token(terms);
    if (token.p != 0.f && token.id < vocab) {
      const float x = gradient(teacher.logit, all, factor, scale, token.id == target);
      row.elements[token.id] = __float2bfloat16(fmaf(-whole * terms.distil, token.p, x));
    }
  }
}

// grid: rows, block: 512, dynamic shared memory: 16·cached bytes
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    cross_entropy_backward_vec8_bf16(bf16* __restrict__ logits, const uint32_t* __restrict__ targets,
                                     float* __restrict__ losses, uint32_t vocab, float scale, uint32_t cached) {
  backward_vec8<false>(logits, targets, losses, vocab, scale, cached, Terms{});
}
EXPORT(cross_entropy_backward_vec8_bf16)

// grid: rows, block: 512, dynamic shared memory: 16·cached bytes
// width: at most 256
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    cross_entropy_terms_vec8_bf16(bf16* __restrict__ logits, const uint32_t* __restrict__ targets,
                                  float* __restrict__ losses, uint32_t vocab, float scale, uint32_t cached,
                                  const float* reference, const float* beta, const uint32_t* ids, const float* probs,
                                  uint32_t width, float distil) {
  backward_vec8<true>(logits, targets, losses, vocab, scale, cached, Terms{reference, beta, ids, probs, width, distil});
}
EXPORT(cross_entropy_terms_vec8_bf16)
// What is kept is a multiple of it.
CONSTANT(cross_entropy_span_bytes, SPAN * sizeof(uint4))
