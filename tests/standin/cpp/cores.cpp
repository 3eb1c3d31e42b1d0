#include "cores.h"
#include <algorithm>
#include <cmath>

namespace standin {

namespace {

// Exponents in the order in which they are compared: zeros below, infinities and NaN above all others, also in sums of two exponents.
constexpr int16_t OF_ZERO = -8192, OF_INFINITY = 8192, LOWEST = -95, HIGHEST = 120;
inline int16_t exponent(float x) {
  const uint32_t magnitude = __float_as_uint(x) & 0x7fffffff;
  const auto finite = (int16_t)((int)std::max(magnitude >> 23, 1u) - 127);
  return magnitude == 0 ? OF_ZERO : magnitude >= 0x7f800000 ? OF_INFINITY : finite;
}

// One sum, for exponents of any size.
float add_any(float sum, const float* a, const float* b, int stride, int terms, int bits) {
  int top = exponent(sum);
  for (int k = 0; k < terms; k++) top = std::max(top, exponent(a[k]) + exponent(b[k * stride]));
  if (top < OF_ZERO / 2) return sum;
  if (top > OF_INFINITY / 4) {
    for (int k = 0; k < terms; k++) sum += a[k] * b[k * stride];
    return sum;
  }
  double total = trunc(ldexp((double)sum, bits - top));
  for (int k = 0; k < terms; k++) total += trunc(ldexp((double)a[k] * b[k * stride], bits - top));
  total = ldexp(total, top - bits);
  const float near = (float)total;
  return fabs((double)near) > fabs(total) ? nextafterf(near, 0.f) : near;
}

// Eight columns at a time, in vector registers.
constexpr int TILE = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Longs __attribute__((vector_size(64)));
template <class V, class T> inline V load(const T* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

// The largest exponents of eight sums: OF_ZERO and below if all terms are zero.
template <int Terms> inline Shorts tops(const float* sums, const int16_t* ea, const int16_t* eb) {
  const Ints bits = load<Ints>(sums) & 0x7fffffff, biased = bits >> 23;
  const Ints finite = (biased > 1 ? biased : 1) - 127;
  Shorts top = __builtin_convertvector(bits == 0 ? (Ints{} + OF_ZERO) : bits >= 0x7f800000 ? (Ints{} + OF_INFINITY) : finite, Shorts);
#pragma GCC unroll 16
  for (int k = 0; k < Terms; k++) {
    const Shorts other = load<Shorts>(eb + k * MAX_COLUMNS) + ea[k];
    top = other > top ? other : top;
  }
  return top;
}

// sums[j] + Σ a[k] · b[k][j] over a block, for eight columns with these largest exponents, between LOWEST and HIGHEST.
template <int Terms, int Bits> inline Floats add_block(const float* sums, const float* a, const float* b, int stride, Shorts top) {
  // In units of the last bit that is kept. A product is below 2^(Bits + 2) units: the sum of eight fits into 31 bits, of sixteen it does not.
  const Ints exponents = (Bits + 127 - __builtin_convertvector(top, Ints)) << 23;
  const Floats units = load<Floats>(&exponents);
  Ints parts[2] = {__builtin_convertvector(load<Floats>(sums) * units, Ints), Ints{}};
#pragma GCC unroll 16
  for (int k = 0; k < Terms; k++) parts[k / 8] += __builtin_convertvector(a[k] * load<Floats>(b + k * stride) * units, Ints);
  const Doubles total = __builtin_convertvector(parts[0], Doubles) + __builtin_convertvector(parts[1], Doubles);
  const Longs cut = load<Longs>(&total) & ~((int64_t(1) << 29) - 1);
  const Ints inverse = (254 << 23) - exponents;
  return __builtin_convertvector(load<Doubles>(&cut), Floats) * load<Floats>(&inverse);
}

template <int Terms, int Bits>
void add_rows(float* sums, const float* a, const int16_t* ea, const float* b, int stride, const int16_t* eb) {
  for (int i = 0; i < 16; i++, sums += stride, a += 16, ea += 16) {
    const Shorts top = tops<Terms>(sums, ea, eb), small = top < LOWEST, none = top < (int16_t)(OF_ZERO / 2);
    const Shorts far = (small & ~none) | (top > HIGHEST);
    const auto any = load<__int128>(&far);
    if (any) {
      for (int j = 0; j < TILE; j++) sums[j] = add_any(sums[j], a, b + j, stride, Terms, Bits);
      continue;
    }
    const Floats next = add_block<Terms, Bits>(sums, a, b, stride, small ? (Shorts{} + LOWEST) : top);
    memcpy(sums, &next, sizeof next);
  }
}

}  // namespace

void add_products(float* sums, const float* a, const float* b, int columns, int stride) {
  alignas(32) int16_t ea[16 * 16], eb[16 * MAX_COLUMNS];
  for (int i = 0; i < 16 * 16; i++) ea[i] = exponent(a[i]);
  for (int k = 0; k < 16; k++) {
    for (int n = 0; n < columns; n++) eb[k * MAX_COLUMNS + n] = exponent(b[k * stride + n]);
  }
  for (int n = 0; n < columns; n += TILE) {
    if (block->launch->hopper) {
      add_rows<16, 25>(sums + n, a, ea, b + n, stride, eb + n);
      continue;
    }
    add_rows<8, 24>(sums + n, a, ea, b + n, stride, eb + n);
    add_rows<8, 24>(sums + n, a + 8, ea + 8, b + 8 * stride + n, stride, eb + 8 * MAX_COLUMNS + n);
  }
}

}  // namespace standin
