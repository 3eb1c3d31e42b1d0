// Arithmetic intrinsics. Approximate instructions are exact, or on noisy devices off by as much as the PTX manual (ISA 9.0) allows.
#pragma once
#include <algorithm>
#include <cmath>
#include "runtime.h"

using std::max;
using std::min;

// glibc's headers declare some of these names for themselves, so they are macros here.
#define __expf(x) exp2_approx((x) * 1.44269504f)
#define __log2f log2_approx
#define __logf(x) (log2_approx(x) * 0.693147181f)
#define __sinf sin_approx
#define __cosf cos_approx

namespace standin {
// Keeps the compiler from contracting a product and a sum into an fma, which intrinsics with a named rounding forbid.
static inline float rounded(float x) {
  asm("" : "+x"(x));
  return x;
}
// Instructions marked .ftz flush subnormal numbers to zero.
static inline float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.f, x) : x; }

// The result of an approximate instruction. On a noisy device it is off by up to `ulps` units in the last place and up to `absolute`, by
// an amount that is a function of the operand.
static inline float approximate(float exact, float operand, int ulps, float absolute = 0.f) {
  // Next to zero a unit in the last place would exceed the value.
  const bool exactly = !std::isfinite(exact) || (absolute == 0.f && fabsf(exact) < 0x1p-125f);
  if (exactly || !block->launch->habits.noisy) return exact;
  uint32_t hash = __float_as_uint(operand) * 0x9e3779b1u;
  hash = (hash ^ hash >> 15) * 0x85ebca6bu;
  hash ^= hash >> 13;
  const float off = exact + absolute * ((float)(hash >> 8) * 0x1p-23f - 1.f);
  return ulps && off != 0.f ? __uint_as_float(__float_as_uint(off) + hash % (2u * (unsigned)ulps + 1u) - (unsigned)ulps) : off;
}
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
static inline float rsqrtf(float x) { return standin::approximate(1.f / sqrtf(x), x, 2); }
static inline float sinpif(float x) { return (float)sin(M_PI * fmod((double)x, 2.0)); }
static inline float cospif(float x) { return (float)cos(M_PI * fmod((double)x, 2.0)); }
static inline void sincospif(float x, float* s, float* c) { *s = sinpif(x), *c = cospif(x); }

namespace standin {
static inline float ex2(float x) { return x == 0.f ? 1.f : approximate(exp2f(x), x, 2); }
static inline float lg2(float x) { return approximate(log2f(x), x, 2, x >= 0.5f && x <= 2.f ? 0x1p-22f : 0.f); }
// Off by up to 2^−20.5, within [−π, π].
static inline float sine(float x) { return approximate(sinf(x), x, 0, 6.75e-7f); }
static inline float cosine(float x) { return approximate(cosf(x), x, 0, 6.75e-7f); }
}  // namespace standin
static inline float exp2_approx(float x) { return standin::flushed(standin::ex2(standin::flushed(x))); }
static inline float log2_approx(float x) { return standin::lg2(standin::flushed(x)); }
static inline float sqrt_approx(float x) { return standin::approximate(sqrtf(standin::flushed(x)), x, 1); }
static inline float rcp_approx(float x) { return standin::flushed(standin::approximate(1.f / standin::flushed(x), x, 1)); }
static inline float sin_approx(float x) { return standin::flushed(standin::sine(standin::flushed(x))); }
static inline float cos_approx(float x) { return standin::flushed(standin::cosine(standin::flushed(x))); }

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
