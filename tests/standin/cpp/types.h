// Vector and bf16 types, laid out and aligned as on the device.
#pragma once
#include <cstdint>
#include <cstring>

#define STANDIN_VECTORS(T, name, align2, align4)                                        \
  struct name##1 { T x; };                                                              \
  struct alignas(align2) name##2 { T x, y; };                                           \
  struct name##3 { T x, y, z; };                                                        \
  struct alignas(align4) name##4 { T x, y, z, w; };                                     \
  static inline name##1 make_##name##1(T x) { return {x}; }                             \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; }                     \
  static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }             \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
STANDIN_VECTORS(signed char, char, 2, 4)
STANDIN_VECTORS(unsigned char, uchar, 2, 4)
STANDIN_VECTORS(short, short, 4, 8)
STANDIN_VECTORS(unsigned short, ushort, 4, 8)
STANDIN_VECTORS(int, int, 8, 16)
STANDIN_VECTORS(unsigned, uint, 8, 16)
STANDIN_VECTORS(long long, longlong, 16, 16)
STANDIN_VECTORS(unsigned long long, ulonglong, 16, 16)
STANDIN_VECTORS(float, float, 8, 16)
STANDIN_VECTORS(double, double, 16, 16)
#undef STANDIN_VECTORS

struct dim3 { unsigned x, y, z; };

struct alignas(2) __nv_bfloat16 { uint16_t x; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };

static inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
static inline float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
static inline int __float_as_int(float x) { return (int)__float_as_uint(x); }

static inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float((uint32_t)b.x << 16); }
// Rounds to nearest even; every NaN becomes the device's canonical NaN.
static inline __nv_bfloat16 __float2bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
static inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __float2bfloat16(x); }
static inline __nv_bfloat16 __float2bfloat16_rz(float x) {
  const uint32_t bits = __float_as_uint(x);
  return {(uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fff : bits >> 16)};
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
static inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
static inline __nv_bfloat162 __float2bfloat162_rn(float x) { return __floats2bfloat162_rn(x, x); }
static inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
static inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
static inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
static inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
static inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
static inline float __low2float(__nv_bfloat162 v) { return __bfloat162float(v.x); }
static inline float __high2float(__nv_bfloat162 v) { return __bfloat162float(v.y); }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.x; }
