// The stand-in's arithmetic: the device's intrinsics, exact where the device approximates.
#pragma once
#include <algorithm>
#include <cmath>
#include "types.h"

using std::max;
using std::min;

// glibc's headers declare some of these names for themselves, so they are macros here.
#define __expf expf
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf
#define __powf powf
#define __sincosf sincosf

namespace standin {
// Keeps the compiler from contracting a product and a sum, which the intrinsics that name a rounding forbid.
static inline float rounded(float x) {
  asm("" : "+x"(x));
  return x;
}
// Subnormal numbers are zeros to the instructions marked .ftz.
static inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.f, x) : x; }
}  // namespace standin

static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return standin::rounded(a * b); }
static inline float __fadd_rn(float a, float b) { return standin::rounded(standin::rounded(a) + standin::rounded(b)); }
static inline float __fsub_rn(float a, float b) { return standin::rounded(standin::rounded(a) - standin::rounded(b)); }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1.f / x; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frsqrt_rn(float x) { return (float)(1.0 / sqrt((double)x)); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
static inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
static inline float sinpif(float x) { return (float)sin(M_PI * fmod((double)x, 2.0)); }
static inline float cospif(float x) { return (float)cos(M_PI * fmod((double)x, 2.0)); }
static inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }

static inline float exp2_approx(float x) { return standin::flushed(exp2f(standin::flushed(x))); }
static inline float log2_approx(float x) { return log2f(standin::flushed(x)); }
static inline float sqrt_approx(float x) { return sqrtf(standin::flushed(x)); }
static inline float rsqrt_approx(float x) { return 1.f / sqrtf(standin::flushed(x)); }
static inline float rcp_approx(float x) { return standin::flushed(1.f / standin::flushed(x)); }
static inline float sin_approx(float x) { return standin::flushed(sinf(standin::flushed(x))); }
static inline float cos_approx(float x) { return cosf(standin::flushed(x)); }
static inline float tanh_approx(float x) { return tanhf(x); }

static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
static inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; i++) y |= (x >> i & 1) << (31 - i);
  return y;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned y = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned s = selector >> (4 * i) & 15, byte = (unsigned)(bytes >> (8 * (s & 7))) & 255;
    y |= (s & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return y;
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) << (shift & 31) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
static inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
static inline int __float2int_rz(float x) { return (int)x; }
static inline int __float2int_rd(float x) { return (int)floorf(x); }
static inline int __float2int_ru(float x) { return (int)ceilf(x); }
static inline unsigned __float2uint_rn(float x) { return x > 0.f ? (unsigned)nearbyintf(x) : 0; }
static inline unsigned __float2uint_rz(float x) { return x > 0.f ? (unsigned)x : 0; }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }
static inline float __ull2float_rn(unsigned long long x) { return (float)x; }
static inline float __double2float_rn(double x) { return (float)x; }
