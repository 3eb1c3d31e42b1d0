#include "cores.h"
#include <algorithm>
#include <cmath>

namespace standin {

namespace {

// Exponents as they are compared: those of zeros are below, those of what is not finite above all others, and so are their sums.
constexpr int16_t OF_ZERO = -8192, OF_INFINITY = 8192, LOWEST = -95, HIGHEST = 120;
inline int16_t exponent(float x) {
  const uint32_t magnitude = __float_as_uint(x) & 0x7fffffff;
  const auto finite = (int16_t)((int)std::max(magnitude >> 23, 1u) - 127);
  return magnitude == 0 ? OF_ZERO : magnitude >= 0x7f800000 ? OF_INFINITY : finite;
}

// One sum, of numbers of any size.
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

// sums[n] += Σ a[k] · b[k][n] over a block, of a tile of columns; ea and eb are the operands' exponents.
template <int Tile, int Terms, int Bits>
inline void add_block(float* sums, const float* a, const int16_t* ea, const float* b, int stride, const int16_t* eb) {
  int16_t top[Tile], lowest = 0, highest = LOWEST;
  for (int j = 0; j < Tile; j++) top[j] = exponent(sums[j]);
  for (int k = 0; k < Terms; k++) {
    for (int j = 0; j < Tile; j++) top[j] = std::max(top[j], (int16_t)(ea[k] + eb[k * MAX_COLUMNS + j]));
  }
  for (int j = 0; j < Tile; j++) {
    lowest = std::min(lowest, top[j] < OF_ZERO / 2 ? LOWEST : top[j]);
    highest = std::max(highest, top[j]);
  }
  if (lowest < LOWEST || highest > HIGHEST) {
    for (int j = 0; j < Tile; j++) sums[j] = add_any(sums[j], a, b + j, stride, Terms, Bits);
    return;
  }
  // In units of the last bit that is kept. A product is below 2^(Bits + 2) of them: eight have room in 31 bits, sixteen do not.
  float units[Tile];
  int32_t parts[2][Tile];
  for (int j = 0; j < Tile; j++) {
    units[j] = __uint_as_float((uint32_t)(Bits - std::max(top[j], LOWEST) + 127) << 23);
    parts[0][j] = (int32_t)(sums[j] * units[j]);
    parts[1][j] = 0;
  }
  for (int k = 0; k < Terms; k++) {
    int32_t* const part = parts[k / 8];
    for (int j = 0; j < Tile; j++) part[j] += (int32_t)(a[k] * b[k * stride + j] * units[j]);
  }
  for (int j = 0; j < Tile; j++) {
    const double total = (double)parts[0][j] + (double)parts[1][j];
    uint64_t bits;
    memcpy(&bits, &total, 8);
    bits &= ~((uint64_t(1) << 29) - 1);
    double cut;
    memcpy(&cut, &bits, 8);
    sums[j] = (float)cut * __uint_as_float((254u << 23) - __float_as_uint(units[j]));
  }
}

template <int Tile> void add_tiles(float* sums, const float* a, const int16_t* ea, const float* b, int stride, const int16_t* eb) {
  if (block->launch->hopper) {
    for (int i = 0; i < 16; i++) add_block<Tile, 16, 25>(sums + i * stride, a + 16 * i, ea + 16 * i, b, stride, eb);
    return;
  }
  for (int half = 0; half < 16; half += 8) {
    const float* const below = b + half * stride;
    const int16_t* const eb_below = eb + half * MAX_COLUMNS;
    for (int i = 0; i < 16; i++) {
      add_block<Tile, 8, 24>(sums + i * stride, a + 16 * i + half, ea + 16 * i + half, below, stride, eb_below);
    }
  }
}

}  // namespace

void add_products(float* sums, const float* a, const float* b, int columns, int stride) {
  alignas(32) int16_t ea[16 * 16], eb[16 * MAX_COLUMNS];
  for (int i = 0; i < 16 * 16; i++) ea[i] = exponent(a[i]);
  for (int k = 0; k < 16; k++) {
    for (int n = 0; n < columns; n++) eb[k * MAX_COLUMNS + n] = exponent(b[k * stride + n]);
  }
  int n = 0;
  for (; n + 32 <= columns; n += 32) add_tiles<32>(sums + n, a, ea, b + n, stride, eb + n);
  for (; n < columns; n += 8) add_tiles<8>(sums + n, a, ea, b + n, stride, eb + n);
}

}  // namespace standin
