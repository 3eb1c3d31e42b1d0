// Accumulation as tensor cores do it, which is not f32 arithmetic: the products of a block are exact; they and the accumulator are
// truncated some bits below the largest exponent among them; their sum is exact, and truncated to a float. 16 products a block and 25 bits
// on Hopper, 8 and 24 on Ampere, as was measured for bf16 with f32 accumulation (Fasi et al., PeerJ Computer Science 7:e330; Khattak and
// Mikaitis, arXiv 2512.07004; MMA-Sim, arXiv 2511.10909). src/cores.rs is the same in Rust.
#pragma once
#include "runtime.h"

namespace standin {

inline float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Maximum number of columns of a product.
constexpr int MAX_COLUMNS = 256;

// sums [16 rows of `stride`] += a [16][16] · b [16 rows of `stride`], `columns` (a multiple of 8) of both, by the device's tensor cores.
STANDIN_API void add_products(float* sums, const float* a, const float* b, int columns, int stride);

}  // namespace standin
