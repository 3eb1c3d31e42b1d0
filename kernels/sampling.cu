// The next token of each row of logits [rows, vocab] bf16, aligned to 2 bytes; tokens [rows].
//   greedy: the first of the largest.
//   nucleus (Holtzman et al., arXiv 1904.09751): of the smallest set of most probable tokens (of equals, the lower ids)
//   whose probability reaches top_p, the first in the order of the ids at which the sum of probabilities exceeds
//   uniform · that of the set.
// NaN is below everything. Where the largest is not finite, a draw is greedy.
//
// The token is that of the CPU backend (src/backend/cpu/sampling.rs), always. Probabilities are integers: weight =
// the whole part of 2⁴⁰·2^((x − top)·scale), scale = log₂e / temperature, in the same f32 operations (fused only
// where named, no approximate instruction) on both sides. Their sums are exact in any order, as long as vocab ≤ 2²³,
// and so are comparisons with them; what is left is two f64 products a row, rounded alike.
//
//   kernel                bytes an element     FLOPs   at 64 × 151936 (Qwen2.5), 3.0 TB/s
//   sampling_greedy_*     2                    1       7 µs
//   sampling_nucleus_*    2, and about 5 reads 80      7 µs of memory; a row is one block's work: some 100 µs, for as
//                         from the L2 cache            many rows as there are multiprocessors
//
// nucleus: pass 1 the largest; 2 the sum of weights; 3 the candidates: tokens lighter than (total − wanted) / vocab
// weigh less than total − wanted together, so that the others hold the set; the keys of up to LIST of them go to
// shared memory (their order there is that of the atomic counter, and does not matter). Then the least key of the set
// by bisection over 16-bit keys, in shared memory, or over the row where the candidates are too many. 4 finds the
// last of the equals with that key that belongs to the set; 5 the token. Both split a range of ids into 32, a warp
// each, until one id is left. A baseline reads scalars, and bisects over the row and all keys.
#include "prelude.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr uint32_t LIST = 16384;
// log₂ of the weight of the most probable token.
constexpr int WEIGHT_BITS = 40;

// Orders bf16 as numbers: −0 is 0, NaN is below −∞.
__device__ __forceinline__ uint32_t key_of(uint32_t bits) {
  if ((bits & 0x7fff) > 0x7f80) return 0;
  if (bits == 0x8000) bits = 0;
  return bits & 0x8000 ? ~bits & 0xffff : bits | 0x8000;
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float((key & 0x8000 ? key ^ 0x8000 : ~key & 0xffff) << 16);
}

// 2^z = 2^n·2^f, n the nearest integer; 2^f by its Taylor series, to 1.2e-7.
__device__ __forceinline__ uint64_t weight_of(float x, float top, float scale) {
  const float z = __fmul_rn(x - top, scale);
  if (!(z >= (float)-WEIGHT_BITS)) return 0;
  const float n = rintf(z), f = z - n;
  float power = 1.5403530e-4f;
  power = fmaf(power, f, 1.3333558e-3f);
  power = fmaf(power, f, 9.618129e-3f);
  power = fmaf(power, f, 5.5504109e-2f);
  power = fmaf(power, f, 2.4022651e-1f);
  power = fmaf(power, f, 6.9314718e-1f);
  power = fmaf(power, f, 1.f);
  return (uint64_t)(power * __uint_as_float((uint32_t)(127 + WEIGHT_BITS + (int)n) << 23));
}

__device__ __forceinline__ uint64_t warp_total(uint64_t x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
// Every thread of the block gets the sum.
__device__ __forceinline__ uint64_t block_total(uint64_t x) {
  __shared__ uint64_t parts[WARPS];
  x = warp_total(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_total(parts[threadIdx.x & 31]);
}
__device__ __forceinline__ uint64_t block_largest(uint64_t x) {
  __shared__ uint64_t parts[WARPS];
  const auto warp_largest = [](uint64_t x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = max(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
  };
  x = warp_largest(x);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_largest(parts[threadIdx.x & 31]);
}

// Calls visit(key, id) for each token of the row, by the block.
template <bool Vectors, class Visit>
__device__ __forceinline__ void visit_row(const uint16_t* __restrict__ row, uint32_t vocab, Visit visit) {
  uint32_t head = vocab, vectors = 0;
  if (Vectors) {
    head = min((uint32_t)(16 - (reinterpret_cast<uintptr_t>(row) & 15)) % 16 / 2, vocab);
    vectors = (vocab - head) / 8;
  }
  const uint4* body = reinterpret_cast<const uint4*>(row + head);
#pragma unroll 4
  for (uint32_t i = threadIdx.x; i < vectors; i += THREADS) {
    const uint4 bits = body[i];
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32_t id = head + i * 8 + 2 * j;
      visit(key_of(words[j] & 0xffff), id);
      visit(key_of(words[j] >> 16), id + 1);
    }
  }
  for (uint32_t i = threadIdx.x; i < vocab - vectors * 8; i += THREADS) {
    const uint32_t id = i < head ? i : i + vectors * 8;
    visit(key_of(row[id]), id);
  }
}

// The id at which the sum of weight(id) first exceeds `goal`, which is below the sum of all.
template <class Weight> __device__ __forceinline__ uint32_t find(uint32_t vocab, uint64_t goal, Weight weight) {
  __shared__ uint64_t sums[WARPS];
  const uint32_t lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  uint32_t begin = 0, end = vocab;
  while (end - begin > 1) {
    const uint32_t piece = (end - begin + WARPS - 1) / WARPS;
    const uint32_t from = begin + warp * piece, to = min(from + piece, end);
    uint64_t sum = 0;
#pragma unroll 8
    for (uint32_t id = from + lane; id < to; id += 32) sum += weight(id);
    sum = warp_total(sum);
    __syncthreads();
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    uint32_t chosen = 0;
    while (chosen < WARPS - 1 && goal >= sums[chosen]) goal -= sums[chosen++];
    begin += chosen * piece;
    end = min(begin + piece, end);
  }
  return begin;
}

template <bool Vectors>
__device__ __forceinline__ uint64_t largest_and_first(const uint16_t* __restrict__ row, uint32_t vocab) {
  uint64_t best = 0;
  visit_row<Vectors>(row, vocab, [&](uint32_t key, uint32_t id) { best = max(best, (uint64_t)key << 32 | ~id); });
  return block_largest(best);
}

// What the set holds: all keys above `key`, and those equal to it up to the id `last`.
struct Nucleus {
  uint32_t key, last;
  uint64_t mass;
};

template <bool Vectors>
__device__ __forceinline__ Nucleus nucleus_of(const uint16_t* __restrict__ row, uint32_t vocab, uint32_t top_key,
                                              float scale, uint64_t total, uint64_t wanted) {
  __shared__ uint16_t list[LIST];
  __shared__ uint32_t listed;
  const float top = value_of(top_key);
  const auto weight = [&](uint32_t key) { return weight_of(value_of(key), top, scale); };
  uint32_t low = 0, high = top_key;
  bool in_list = false;
  if (Vectors) {
    // Half of the bound: weights of neighbouring keys may be off by their rounding.
    const uint64_t light = (total - wanted) / vocab / 2;
    for (uint32_t step = 0x8000; step > 0; step /= 2) {
      if (low + step <= top_key && weight(low + step) <= light) low += step;
    }
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    visit_row<Vectors>(row, vocab, [&](uint32_t key, uint32_t) {
      if (key < low || *reinterpret_cast<volatile uint32_t*>(&listed) >= LIST) return;
      const uint32_t place = atomicAdd(&listed, 1u);
      if (place < LIST) list[place] = (uint16_t)key;
    });
    __syncthreads();
    in_list = listed < LIST;
  }
  // Σ weights of the keys from `least` on.
  const auto mass_from = [&](uint32_t least) {
    uint64_t sum = 0;
    if (in_list) {
      for (uint32_t i = threadIdx.x; i < listed; i += THREADS) sum += list[i] >= least ? weight(list[i]) : 0;
    } else {
      visit_row<Vectors>(row, vocab, [&](uint32_t key, uint32_t) { sum += key >= least ? weight(key) : 0; });
    }
    return block_total(sum);
  };
  uint64_t above = 0;
  while (low < high) {
    const uint32_t middle = (low + high + 1) / 2;
    const uint64_t mass = mass_from(middle);
    if (mass >= wanted) {
      low = middle;
    } else {
      high = middle - 1;
      above = mass;
    }
  }
  const uint64_t each = weight(low), equals = (wanted - above + each - 1) / each;
  const uint32_t last = find(vocab, equals - 1, [&](uint32_t id) { return (uint64_t)(key_of(row[id]) == low); });
  return Nucleus{low, last, above + equals * each};
}

template <bool Vectors>
__device__ __forceinline__ uint32_t drawn(const uint16_t* __restrict__ row, uint32_t vocab, float uniform, float scale,
                                          float top_p) {
  const uint64_t best = largest_and_first<Vectors>(row, vocab);
  const uint32_t top_key = (uint32_t)(best >> 32);
  const float top = value_of(top_key);
  uint64_t total = 0;
  visit_row<Vectors>(row, vocab, [&](uint32_t key, uint32_t) { total += weight_of(value_of(key), top, scale); });
  total = block_total(total);
  if (total == 0) return ~(uint32_t)best;
  Nucleus set = {0, vocab, total};
  if (top_p < 1.f) {
    const uint64_t wanted = (uint64_t)ceil((double)top_p * (double)total);
    set = nucleus_of<Vectors>(row, vocab, top_key, scale, total, min(max(wanted, (uint64_t)1), total));
  }
  const uint64_t goal = min((uint64_t)((double)uniform * (double)set.mass), set.mass - 1);
  return find(vocab, goal, [&](uint32_t id) {
    const uint32_t key = key_of(row[id]);
    const bool inside = key > set.key || (key == set.key && id <= set.last);
    return inside ? weight_of(value_of(key), top, scale) : 0;
  });
}

// grid: rows, block: 1024, 256 bytes of shared memory
#define GREEDY(name, Vectors)                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
      name(const bf16* __restrict__ logits, uint32_t* __restrict__ tokens, uint32_t vocab) {                        \
    const uint16_t* row = reinterpret_cast<const uint16_t*>(logits) + (uint64_t)blockIdx.x * vocab;                 \
    const uint64_t best = largest_and_first<Vectors>(row, vocab);                                                   \
    if (threadIdx.x == 0) tokens[blockIdx.x] = ~(uint32_t)best;                                                     \
  }                                                                                                                 \
  EXPORT(name)
GREEDY(sampling_greedy_baseline_bf16, false)
GREEDY(sampling_greedy_vec8_bf16, true)

// grid: rows, block: 1024, 33 KiB of shared memory
#define NUCLEUS(name, Vectors)                                                                                      \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                           \
      name(const bf16* __restrict__ logits, const float* __restrict__ uniforms, uint32_t* __restrict__ tokens,      \
           uint32_t vocab, float scale, float top_p) {                                                              \
    const uint16_t* row = reinterpret_cast<const uint16_t*>(logits) + (uint64_t)blockIdx.x * vocab;                 \
    const uint32_t token = drawn<Vectors>(row, vocab, uniforms[blockIdx.x], scale, top_p);                          \
    if (threadIdx.x == 0) tokens[blockIdx.x] = token;                                                               \
  }                                                                                                                 \
  EXPORT(name)
NUCLEUS(sampling_nucleus_baseline_bf16, false)
NUCLEUS(sampling_nucleus_vec8_bf16, true)
