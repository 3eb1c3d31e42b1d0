// PTX instructions as C++ functions, to run nvcc's output: src/ptx.rs translates each instruction into a call of the function of its
// name (`mul.wide.u32 d, a, b` into mul_wide<u32>(d, a, b)). Semantics are those of NVIDIA's PTX manual (ISA 9.0). Registers are untyped
// bits. An instruction that is missing here does not compile.
//
// Warpgroup products execute when they are issued; that results are not read too early is checked on the kernel file itself.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>
#include "hopper.h"
#include "races.h"

namespace standin::ptx {

using u8 = uint8_t; using u16 = uint16_t; using u32 = uint32_t; using u64 = uint64_t; using pred = bool;
using s8 = int8_t; using s16 = int16_t; using s32 = int32_t; using s64 = int64_t; using f32 = float; using f64 = double;
using b8 = u8; using b16 = u16; using b32 = u32; using b64 = u64;
struct bf16 {};
struct bf16x2 {};

template <class To, class From> inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
template <size_t Bytes> struct Unsigned;
template <> struct Unsigned<1> { using type = u8; };
template <> struct Unsigned<2> { using type = u16; };
template <> struct Unsigned<4> { using type = u32; };
template <> struct Unsigned<8> { using type = u64; };
template <class T> using unsigned_of = typename Unsigned<sizeof(T)>::type;

// An operand, a register or a constant of any width, as a T.
template <class T, class Operand> inline T as(Operand operand) {
  if constexpr (std::is_same_v<T, bool>) return operand;
  else return bits<T>((unsigned_of<T>)operand);
}
// Writes a T into a register, which may be wider: signed values are sign-extended.
template <class Register, class T> inline void put(Register& to, T value) {
  if constexpr (std::is_floating_point_v<T>) to = bits<unsigned_of<T>>(value);
  else to = (Register)value;
}

// ---- arithmetic: NAME<type>(d, a), (d, a, b), (d, a, b, c)
#define UNARY(name, value) template <class T, class D, class A> inline void name(D& d, A a_) { const T a = as<T>(a_); put(d, (T)(value)); }
#define BINARY(name, value) \
  template <class T, class D, class A, class B> inline void name(D& d, A a_, B b_) { const T a = as<T>(a_), b = as<T>(b_); put(d, (T)(value)); }
#define TERNARY(name, value)                                             \
  template <class T, class D, class A, class B, class C> inline void name(D& d, A a_, B b_, C c_) { \
    const T a = as<T>(a_), b = as<T>(b_), c = as<T>(c_);                 \
    put(d, (T)(value));                                                  \
  }
// If one operand is NaN, the result is the other.
template <class T> inline T least(T a, T b) { return a != a ? b : b < a ? b : a; }
template <class T> inline T greatest(T a, T b) { return a != a ? b : a < b ? b : a; }
template <class T> inline auto wide(T a) {
  if constexpr (std::is_same_v<T, u32>) return (u64)a;
  else if constexpr (std::is_same_v<T, s32>) return (s64)a;
  else if constexpr (std::is_same_v<T, u16>) return (u32)a;
  else if constexpr (std::is_same_v<T, s16>) return (s32)a;
  else if constexpr (std::is_same_v<T, u64>) return (unsigned __int128)a;
  else return (__int128)a;
}

BINARY(add, a + b)
BINARY(add_rn, a + b)
BINARY(sub, a - b)
BINARY(sub_rn, a - b)
BINARY(mul, a * b)
BINARY(mul_rn, a * b)
BINARY(mul_lo, a * b)
BINARY(mul_hi, wide(a) * b >> 8 * sizeof(T))
TERNARY(mad_lo, a * b + c)
TERNARY(fma_rn, std::fma(a, b, c))
BINARY(div, a / b)
BINARY(div_rn, a / b)
BINARY(rem, a % b)
BINARY(min, least(a, b))
BINARY(max, greatest(a, b))
UNARY(neg, -a)
UNARY(abs, a < 0 ? -a : a)
UNARY(sqrt_rn, std::sqrt(a))
UNARY(rcp_rn, 1 / a)
UNARY(ex2_approx, ex2(a))
UNARY(ex2_approx_ftz, exp2_approx(a))
UNARY(lg2_approx_ftz, log2_approx(a))
UNARY(sin_approx_ftz, sin_approx(a))
UNARY(cos_approx_ftz, cos_approx(a))
UNARY(sqrt_approx_ftz, sqrt_approx(a))
UNARY(rcp_approx_ftz, rcp_approx(a))
template <class T, class D, class A, class B> inline void mul_wide(D& d, A a, B b) { d = (D)(wide(as<T>(a)) * as<T>(b)); }
template <class T, class D, class A, class B, class C> inline void mad_wide(D& d, A a, B b, C c) { d = (D)(wide(as<T>(a)) * as<T>(b) + c); }
// Rounding down: the product of two floats is exact in f64.
template <class T, class D, class A, class B, class C> inline void fma_rm(D& d, A a, B b, C c) {
  const f64 exact = (f64)as<f32>(a) * as<f32>(b) + as<f32>(c);
  const f32 near = (f32)exact;
  put(d, near > exact ? std::nextafter(near, -INFINITY) : near);
}

// ---- bits
BINARY(and_, a & b)
BINARY(or_, a | b)
BINARY(xor_, a ^ b)
UNARY(not_, (std::is_same_v<T, bool> ? !a : ~a))
template <class T, class D, class A> inline void popc(D& d, A a) { d = (D)__builtin_popcountll(as<T>(a)); }
template <class T, class D, class A, class B> inline void shl(D& d, A a, B by) { d = (u32)by >= 8 * sizeof(T) ? 0 : as<T>(a) << (u32)by; }
template <class T, class D, class A, class B> inline void shr(D& d, A a, B by) {
  constexpr u32 WIDTH = 8 * sizeof(T);
  const bool past = (u32)by >= WIDTH;
  put(d, (T)(past && std::is_unsigned_v<T> ? 0 : as<T>(a) >> (past ? WIDTH - 1 : (u32)by)));
}
template <class T, class D, class A, class B> inline void bfi(D& d, A a, B b, u32 at, u32 length) {
  const T mask = (T)(((length & 255) >= 8 * sizeof(T) ? T(0) : T(1) << (length & 255)) - 1) << (at & 255);
  d = (as<T>(a) << (at & 255) & mask) | (as<T>(b) & ~mask);
}
template <class T, class D> inline void prmt(D& d, u32 a, u32 b, u32 select) {
  const u64 bytes = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    const u32 which = select >> 4 * i & 15, byte = (u32)(bytes >> 8 * (which & 7)) & 255;
    result |= (which & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  d = result;
}
template <class T, class D, class A, class B> inline void selp(D& d, A a, B b, bool p) { d = p ? as<unsigned_of<T>>(a) : as<unsigned_of<T>>(b); }

// ---- comparisons
#define COMPARE(name, value) \
  template <class T, class A, class B> inline bool name(A a_, B b_) { const T a = as<T>(a_), b = as<T>(b_); return value; }
COMPARE(eq, a == b)
COMPARE(ne, a != b && a == a && b == b)
COMPARE(lt, a < b)
COMPARE(le, a <= b)
COMPARE(gt, a > b)
COMPARE(ge, a >= b)
// Unordered comparison: true if an operand is NaN.
COMPARE(equ, !(a < b || a > b))
COMPARE(neu, a != b)
COMPARE(ltu, !(a >= b))
COMPARE(leu, !(a > b))
COMPARE(gtu, !(a <= b))
COMPARE(geu, !(a < b))
COMPARE(num, a == a && b == b)
COMPARE(nan, a != a || b != b)

// ---- moves and conversions
template <class T, class D, class A> inline void mov(D& d, A a) { d = as<unsigned_of<T>>(a); }
template <class D, class A, class B> inline void pack(D& d, A low, B high) {
  constexpr int HALF = 4 * sizeof(D);
  d = (D)((D)high << HALF | (low & (((D)1 << HALF) - 1)));
}
template <class L, class H, class A> inline void unpack(L& low, H& high, A a) { low = (L)a, high = (H)(a >> 8 * sizeof(L)); }

template <class To, class From, class D, class A> inline void cvt(D& d, A a) { put(d, (To)as<From>(a)); }
template <class To, class From, class D, class A> inline void cvt_rn(D& d, A a) {
  if constexpr (std::is_same_v<To, bf16>) d = __float2bfloat16(as<f32>(a)).x;
  else put(d, (To)as<From>(a));
}
// The second operand goes into the low half.
template <class To, class From, class D, class A, class B> inline void cvt_rn(D& d, A high, B low) {
  static_assert(std::is_same_v<To, bf16x2>);
  d = (u32)__float2bfloat16(as<f32>(high)).x << 16 | __float2bfloat16(as<f32>(low)).x;
}
template <class From, class D, class A> inline void cvt_bf16(D& d, A a) { d = (u32)(u16)a << 16; }
// Rounds towards zero and saturates; NaN becomes 0.
template <class To, class From, class D, class A> inline void cvt_rzi(D& d, A a) {
  const From x = as<From>(a), past = std::ldexp(From(1), 8 * sizeof(To) - std::is_signed_v<To>);
  const From before = std::is_signed_v<To> ? -past : 0;
  put(d, x != x ? To(0) : x >= past ? std::numeric_limits<To>::max() : x <= before ? std::numeric_limits<To>::min() : (To)x);
}
template <class To, class From, class D, class A> inline void cvt_rni(D& d, A a) { put(d, (To)std::nearbyint(as<From>(a))); }
template <class To, class From, class D, class A> inline void cvt_rpi(D& d, A a) { put(d, (To)std::ceil(as<From>(a))); }
template <class To, class From, class D, class A> inline void cvt_sat(D& d, A a) {
  const From x = as<From>(a);
  put(d, (To)(x > 0 ? x < 1 ? x : 1 : 0));
}

// ---- addresses: those of shared memory are what shared_address gives
inline unsigned char* shared(u32 address, size_t bytes = 1) {
  unsigned char* place = shared_place(address, bytes);
  if (!place) die("an address outside shared memory");
  return place;
}
template <class D, class A> inline void cvta_to_global(D& d, A a) { d = a; }
template <class D, class A> inline void cvta_local(D& d, A a) { d = a; }
template <class D, class A> inline void cvta_to_local(D& d, A a) { d = a; }
template <class D, class A> inline void cvta_param(D& d, A a) { d = a; }
template <class D, class A> inline void cvta_to_shared(D& d, A a) { d = (D)shared_address(reinterpret_cast<const void*>(a)); }
template <class D, class A> inline void cvta_shared(D& d, A a) { d = (D) reinterpret_cast<u64>(shared((u32)a)); }

// Whether the kernel that runs is for Hopper.
inline bool hopper() { return strstr(block->launch->kernel->file, "_sm90") != nullptr; }

// ---- memory: `count` of T from a place, by the instruction `site`
template <class T> inline unsigned char* in_shared(const Site& site, u32 address, int count) {
  const int bytes = (int)sizeof(T) * count;
  if (address % bytes) die("misaligned access");
  unsigned char* at = shared(address, bytes);
  if (block->watching) {
    touch(site, address, bytes);
    order(&site, at, bytes, site.writes);
    if (site.writes && hopper()) write_unfenced(at, bytes);
  }
  return at;
}
template <class T> inline unsigned char* in_global(const Site& site, u64 address, int count) {
  const int bytes = (int)sizeof(T) * count;
  if (address % bytes) die("misaligned access");
  if (block->watching) {
    touch(site, address, bytes);
    order_between_blocks(&site, address, bytes, site.writes);
  }
  return reinterpret_cast<unsigned char*>(address);
}
inline unsigned char* in_local(u64 address) { return reinterpret_cast<unsigned char*>(address); }
template <class T, class... D> inline void load(const unsigned char* at, D&... d) {
  const auto one = [&](auto& to) {
    T value;
    memcpy(&value, at, sizeof value);
    put(to, value);
    at += sizeof value;
  };
  (one(d), ...);
}
template <class T, class... S> inline void store(unsigned char* at, S... s) {
  const auto one = [&](auto from) {
    const T value = as<T>(from);
    memcpy(at, &value, sizeof value);
    at += sizeof value;
  };
  (one(s), ...);
}
template <class T, class D, class S> inline void atom_global_add(D& d, u64 at, S s) { put(d, atomicAdd(reinterpret_cast<T*>(at), as<T>(s))); }
template <class T, class D, class S> inline void atom_shared_add(D& d, u32 at, S s) {
  put(d, atomicAdd(reinterpret_cast<T*>(shared(at, sizeof(T))), as<T>(s)));
}
template <class T, class D, class S> inline void atom_shared_or(D& d, u32 at, S s) {
  put(d, atomicOr(reinterpret_cast<T*>(shared(at, sizeof(T))), as<T>(s)));
}

// ---- threads
#define $tid_x threadIdx.x
#define $tid_y threadIdx.y
#define $tid_z threadIdx.z
#define $ntid_x blockDim.x
#define $ntid_y blockDim.y
#define $ntid_z blockDim.z
#define $ctaid_x blockIdx.x
#define $ctaid_y blockIdx.y
#define $ctaid_z blockIdx.z
#define $nctaid_x gridDim.x
#define $nctaid_y gridDim.y
#define $nctaid_z gridDim.z
inline void bar_sync(u32 id, u32 threads = 0) { barrier((int)id, (int)threads, true); }
inline void bar_arrive(u32 id, u32 threads) { barrier((int)id, (int)threads, false); }
inline void bar_warp_sync(u32 mask) { __syncwarp(mask); }
inline void nanosleep_u32(u32) { sleep(); }
inline void fence_acq_rel_gpu() { fence(); }
inline void fence_sc_gpu() { fence(); }
inline void membar_gl() { fence(); }
// `clamp`: its low 5 bits the last lane, bits 8 to 12 the lanes' segment.
enum Shuffle { UP, DOWN, BUTTERFLY, INDEX };
template <class D> inline void shuffle(Shuffle mode, D& d, bool& inside, u32 a, u32 b, u32 clamp, u32 mask) {
  const int lane = block->current->rank & 31, segment = (int)(clamp >> 8 & 31), last = (lane & segment) | ((int)clamp & 31 & ~segment);
  const int first = lane & segment, by = (int)(b & 31);
  const int from = mode == UP ? lane - by : mode == DOWN ? lane + by : mode == BUTTERFLY ? lane ^ by : first | (by & ~segment);
  inside = mode == UP ? from >= last : from <= last;
  d = standin::shuffle(mask, a, 64 + mode, [&](int) { return inside ? from : lane; });
}
template <class T, class D> inline void shfl_sync_bfly(D& d, bool& p, u32 a, u32 b, u32 c, u32 mask) { ptx::shuffle(BUTTERFLY, d, p, a, b, c, mask); }
template <class T, class D> inline void shfl_sync_up(D& d, bool& p, u32 a, u32 b, u32 c, u32 mask) { ptx::shuffle(UP, d, p, a, b, c, mask); }
template <class T, class D> inline void shfl_sync_down(D& d, bool& p, u32 a, u32 b, u32 c, u32 mask) { ptx::shuffle(DOWN, d, p, a, b, c, mask); }
template <class T, class D> inline void shfl_sync_idx(D& d, bool& p, u32 a, u32 b, u32 c, u32 mask) { ptx::shuffle(INDEX, d, p, a, b, c, mask); }
template <class T, class D> inline void vote_sync_ballot(D& d, bool p, u32 mask) { d = __ballot_sync(mask, p); }

// ---- asynchronous copies
inline void cp_async_cg_shared_global(const Site& site, u32 to, u64 from, u32 size, u32 bytes = 16) {
  if (size != 16) die("cp.async: 16 bytes are known here");
  if (block->watching) {
    if (bytes) touch(site, from, (int)bytes), order_between_blocks(&site, from, (int)bytes, false);
    order(&site, shared(to, 16), 16, true);
  }
  cp_async16(shared(to, 16), reinterpret_cast<const void*>(from), (int)bytes);
}
inline void cp_async_commit_group() { cp_async_commit(); }
inline void cp_async_wait_group(int pending) {
  switch (pending) {
    case 0: return cp_async_wait<0>();
    case 1: return cp_async_wait<1>();
    case 2: return cp_async_wait<2>();
    case 3: return cp_async_wait<3>();
    default: die("cp.async.wait_group: 0 to 3 are known here");
  }
}

// ---- tensor cores
template <class... Registers> inline void ldmatrix(const Site& site, bool transposed, u32 row, Registers&... r) {
  u32 parts[sizeof...(r)];
  const bool named = (block->current->rank & 31) < 8 * (int)sizeof...(r);
  const void* at = named ? shared(row, 16) : nullptr;
  if (block->watching && named) {
    touch(site, row, 16);
    order(&site, shared(row, 16), 16, false);
  }
  transposed ? standin::ldmatrix<sizeof...(r), true>(parts, at) : standin::ldmatrix<sizeof...(r), false>(parts, at);
  int i = 0;
  ((r = parts[i++]), ...);
}
inline void stmatrix(const Site& site, u32 row, u32 r0, u32 r1, u32 r2, u32 r3) {
  const u32 parts[4] = {r0, r1, r2, r3};
  if (block->watching) {
    touch(site, row, 16);
    order(&site, shared(row, 16), 16, true);
  }
  stmatrix_x4(shared(row, 16), parts);
}
inline void mma_m16n8k16(u32& d0, u32& d1, u32& d2, u32& d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, u32 c0, u32 c1, u32 c2, u32 c3) {
  float d[4] = {as<f32>(c0), as<f32>(c1), as<f32>(c2), as<f32>(c3)};
  const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  mma_bf16(d, a, b);
  put(d0, d[0]), put(d1, d[1]), put(d2, d[2]), put(d3, d[3]);
}

// ---- mbarriers and bulk copies
inline uint64_t* barrier_at(u32 address) { return reinterpret_cast<uint64_t*>(shared(address, 8)); }
inline void mbarrier_init_shared_cta_b64(u32 at, u32 arrivals) { mbarrier_init(barrier_at(at), arrivals); }
inline void mbarrier_arrive_shared_cta_b64(u64, u32 at) { mbarrier_arrive(barrier_at(at)); }
inline void mbarrier_arrive_expect_tx_shared_cta_b64(u64, u32 at, u32 bytes) { mbarrier_expect(barrier_at(at), bytes); }
inline void mbarrier_try_wait_parity_shared_cta_b64(bool& done, u32 at, u32 parity) { mbarrier_wait(barrier_at(at), parity), done = true; }
inline void fence_mbarrier_init_release_cluster() { mbarrier_fence_init(); }
inline void fence_proxy_async_shared_cta() { fence_proxy_async(); }
inline void cp_async_bulk_tensor_2d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(u32 to, u64 map, u32 x, u32 y, u32 at) {
  tma_load_2d(shared(to), reinterpret_cast<const CUtensorMap*>(map), barrier_at(at), (int)x, (int)y);
}
inline void cp_async_bulk_tensor_3d_shared_cluster_global_tile_mbarrier_complete_tx_bytes(u32 to, u64 map, u32 x, u32 y, u32 z, u32 at) {
  tma_load_3d(shared(to), reinterpret_cast<const CUtensorMap*>(map), barrier_at(at), (int)x, (int)y, (int)z);
}
inline void cp_async_bulk_tensor_3d_global_shared_cta_tile_bulk_group(u64 map, u32 x, u32 y, u32 z, u32 from) {
  tma_store_3d(reinterpret_cast<const CUtensorMap*>(map), shared(from), (int)x, (int)y, (int)z);
}
inline void cp_reduce_async_bulk_tensor_3d_global_shared_cta_add_tile_bulk_group(u64 map, u32 x, u32 y, u32 z, u32 from) {
  tma_add_3d(reinterpret_cast<const CUtensorMap*>(map), shared(from), (int)x, (int)y, (int)z);
}
inline void cp_async_bulk_commit_group() { tma_store_commit(); }
inline void cp_async_bulk_wait_group_read(int pending) { store_wait(pending); }
inline void setmaxnreg_inc_sync_aligned_u32(u32 to) { registers_change((int)to, true); }
inline void setmaxnreg_dec_sync_aligned_u32(u32 to) { registers_change((int)to, false); }

// ---- warpgroup products
inline void wgmma_fence_sync_aligned() { wgmma_fence(); }
inline void wgmma_commit_group_sync_aligned() {
  meet_all(49, nullptr, [](void**) { if (block->watching) commit_reads(); });
}
inline void wgmma_wait_group_sync_aligned(int pending) {
  meet_all(50, nullptr, [&](void**) { if (block->watching) finish_reads(pending); });
}
template <bool TransA, bool TransB, bool InRegisters, class... Registers>
inline void product(const u32* a_registers, u64 a, u64 b, bool accumulate, Registers&... r) {
  float d[sizeof...(r)];
  int i = 0;
  ((d[i++] = as<f32>(r)), ...);
  standin::wgmma<2 * (int)sizeof...(r), TransA, TransB, InRegisters>(d, a_registers, a, b, accumulate);
  wgmma_commit(), wgmma_wait<0>(), wgmma_fence();
  i = 0;
  ((put(r, d[i++])), ...);
}
template <class... Registers>
inline void wgmma(u64 a, u64 b, bool accumulate, int scale_a, int scale_b, int trans_a, int trans_b, Registers&... r) {
  if (scale_a != 1 || scale_b != 1) die("wgmma: a scale other than 1");
  if (trans_a) trans_b ? product<true, true, false>(nullptr, a, b, accumulate, r...) : product<true, false, false>(nullptr, a, b, accumulate, r...);
  else trans_b ? product<false, true, false>(nullptr, a, b, accumulate, r...) : product<false, false, false>(nullptr, a, b, accumulate, r...);
}
template <class... Registers>
inline void wgmma_registers(u32 a0, u32 a1, u32 a2, u32 a3, u64 b, bool accumulate, int scale_a, int scale_b, int trans_b, Registers&... r) {
  if (scale_a != 1 || scale_b != 1) die("wgmma: a scale other than 1");
  const u32 a[4] = {a0, a1, a2, a3};
  trans_b ? product<false, true, true>(a, 0, b, accumulate, r...) : product<false, false, true>(a, 0, b, accumulate, r...);
}

#undef UNARY
#undef BINARY
#undef TERNARY
#undef COMPARE

// Registers a kernel: name, file, parameters, and the function that runs one thread.
struct Export {
  Kernel record;
  template <int N> Export(const char* name, const char* file, const Parameter (&layout)[N], void (*call)(const unsigned char*))
      : record{name, file, N - 1, layout, layout[N - 1].offset, call, (const void*)call, 0, 0} {
    add_kernel(&record);
  }
};

}  // namespace standin::ptx
