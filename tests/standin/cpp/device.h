// CUDA C++ for g++: the built-ins of nvcc, and the counterpart of every wrapper of kernels/prelude.cuh. With it g++ compiles the kernel
// files unchanged. Unlike on a GPU a block runs alone until it waits for another (see runtime.h), and there are no caches, bank conflicts or
// clusters. Shared memory is NaN when a block starts.
#pragma once
#include "cores.h"
#include "numbers.h"
#include "runtime.h"

#define EXPORT(kernel) static ::standin::Export<&kernel> standin_export_##kernel(#kernel, __BASE_FILE__);

// swat reads exported constants from nvcc's PTX.
#define CONSTANT(name, ...) [[maybe_unused]] constexpr uint32_t name = __VA_ARGS__;

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// A block runs on one CPU thread, so that a thread-local variable is shared by the block.
#define __shared__ static thread_local

#define dynamic_shared (::standin::block->dynamic)
#define threadIdx (::standin::block->current->index)
#define blockIdx (::standin::block->index)
#define blockDim (::standin::block->launch->block)
#define gridDim (::standin::block->launch->grid)
#define warpSize 32

// Addresses in shared memory: the dynamic part from 0, the static part in the last bytes of an 18-bit window.
static inline uint32_t shared_address(const void* p) {
  const auto* byte = static_cast<const unsigned char*>(p);
  const ::standin::Block& b = *::standin::block;
  if (byte >= b.dynamic && byte <= b.dynamic + b.launch->shared) return (uint32_t)(byte - b.dynamic);
  const size_t statics = b.launch->kernel->statics_bytes;
  if (byte >= b.statics && byte < b.statics + statics) return (uint32_t)(0x40000 - statics + (byte - b.statics));
  ::standin::die("an address of shared memory is needed, this one is elsewhere");
}
namespace standin {
// Pointer to `bytes` at a shared-memory address; null if they are out of bounds.
inline unsigned char* shared_place(size_t address, size_t bytes) {
  const Block& b = *block;
  const size_t statics = b.launch->kernel->statics_bytes, window = 0x40000;
  if (address + bytes <= b.launch->shared) return b.dynamic + address;
  if (address >= window - statics && address + bytes <= window) return b.statics + (address - (window - statics));
  return nullptr;
}
}  // namespace standin

// ---- barriers and fences
static inline void __syncthreads() { ::standin::barrier(0, 0, true); }
static inline void __syncwarp(unsigned mask = ~0u) {
  ::standin::meet(mask, 1, nullptr, [](void**, uint32_t) {});
}
static inline void named_barrier(int id, int threads) { ::standin::barrier(id, threads, true); }
static inline void named_barrier_arrive(int id, int threads) { ::standin::barrier(id, threads, false); }
static inline void __threadfence() { ::standin::fence(); }
static inline void __threadfence_block() {}
static inline void __threadfence_system() { __threadfence(); }
static inline void __nanosleep(unsigned) { ::standin::sleep(); }
[[noreturn]] static inline void __trap() { ::standin::die("__trap"); }

// ---- memory
template <class T> static inline T __ldg(const T* p) { return *p; }
template <class T> static inline T __ldcs(const T* p) { return *p; }
template <class T> static inline T __ldcg(const T* p) { return *p; }
template <class T> static inline T __ldca(const T* p) { return *p; }
template <class T> static inline void __stcs(T* p, T v) { *p = v; }
template <class T> static inline void __stcg(T* p, T v) { *p = v; }
template <class T> static inline void __stwt(T* p, T v) { *p = v; }
template <class V> static inline V load_streaming(const V* p) { return *p; }
template <class V> static inline void store_streaming(V* p, V v) { *p = v; }
template <class V> static inline void store_undivided(V* p, V v) { *p = v; }

namespace standin {
template <class T, class Change> inline T atomically(T* p, Change change) {
  T old, next;
  atomic_access(p);
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do next = change(old);
  while (!__atomic_compare_exchange(p, &old, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
}  // namespace standin
template <class T, class U> static inline T atomicAdd(T* p, U v) {
  return ::standin::atomically(p, [=](T old) { return (T)(old + (T)v); });
}
template <class T, class U> static inline T atomicSub(T* p, U v) {
  return ::standin::atomically(p, [=](T old) { return (T)(old - (T)v); });
}
template <class T, class U> static inline T atomicMax(T* p, U v) {
  return ::standin::atomically(p, [=](T old) { return old < (T)v ? (T)v : old; });
}
template <class T, class U> static inline T atomicMin(T* p, U v) {
  return ::standin::atomically(p, [=](T old) { return (T)v < old ? (T)v : old; });
}
template <class T, class U> static inline T atomicAnd(T* p, U v) {
  return ::standin::atomically(p, [=](T old) { return (T)(old & (T)v); });
}
template <class T, class U> static inline T atomicOr(T* p, U v) {
  return ::standin::atomically(p, [=](T old) { return (T)(old | (T)v); });
}
template <class T, class U> static inline T atomicXor(T* p, U v) {
  return ::standin::atomically(p, [=](T old) { return (T)(old ^ (T)v); });
}
template <class T, class U> static inline T atomicExch(T* p, U v) {
  return ::standin::atomically(p, [=](T) { return (T)v; });
}
template <class T, class U, class V> static inline T atomicCAS(T* p, U expected, V v) {
  return ::standin::atomically(p, [=](T old) { return old == (T)expected ? (T)v : old; });
}
static inline unsigned atomicInc(unsigned* p, unsigned last) {
  return ::standin::atomically(p, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}

// ---- lanes of a warp
namespace standin {
// Lane l gets the value of source(l); a source outside the warp or width means its own.
template <class T, class Source> inline T shuffle(unsigned mask, T value, int what, Source source) {
  struct Lane { T in, out; int from; } mine{value, value, source(block->current->rank & 31)};
  meet(mask, what, &mine, [](void** each, uint32_t lanes) {
    for (int l = 0; l < 32; l++) {
      if (!(lanes >> l & 1)) continue;
      Lane& lane = *static_cast<Lane*>(each[l]);
      if (!(lanes >> lane.from & 1)) die("a shuffle reads from a lane that takes no part in it");
      lane.out = static_cast<Lane*>(each[lane.from])->in;
    }
  });
  return mine.out;
}
template <class T, class Fold> inline T reduce(unsigned mask, T value, int what, Fold fold) {
  struct Lane { T in, out; } mine{value, value};
  meet(mask, what, &mine, [&](void** each, uint32_t lanes) {
    const int first = __builtin_ctz(lanes);
    T all = static_cast<Lane*>(each[first])->in;
    for (int l = first + 1; l < 32; l++) if (lanes >> l & 1) all = fold(all, static_cast<Lane*>(each[l])->in);
    for (int l = 0; l < 32; l++) if (lanes >> l & 1) static_cast<Lane*>(each[l])->out = all;
  });
  return mine.out;
}
}  // namespace standin
template <class T> static inline T __shfl_sync(unsigned mask, T v, int from, int width = 32) {
  return ::standin::shuffle(mask, v, 2, [=](int l) { return (l & ~(width - 1)) | (from & (width - 1)); });
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  return ::standin::shuffle(mask, v, 3, [=](int l) { return (l ^ bits) < (l & ~(width - 1)) + width ? l ^ bits : l; });
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
  return ::standin::shuffle(mask, v, 4, [=](int l) { return (l & (width - 1)) + (int)by < width ? l + (int)by : l; });
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
  return ::standin::shuffle(mask, v, 5, [=](int l) { return (l & (width - 1)) >= (int)by ? l - (int)by : l; });
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned mine = predicate ? 1u << (::standin::block->current->rank & 31) : 0;
  return ::standin::reduce(mask, mine, 6, [](unsigned a, unsigned b) { return a | b; });
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T> static inline T __reduce_add_sync(unsigned mask, T v) {
  return ::standin::reduce(mask, v, 7, [](T a, T b) { return (T)(a + b); });
}
template <class T> static inline T __reduce_max_sync(unsigned mask, T v) {
  return ::standin::reduce(mask, v, 8, [](T a, T b) { return a < b ? b : a; });
}
template <class T> static inline T __reduce_min_sync(unsigned mask, T v) {
  return ::standin::reduce(mask, v, 9, [](T a, T b) { return b < a ? b : a; });
}

// ---- asynchronous copies, global to shared memory
namespace standin {
inline void finish(const Copy& c) {
  memcpy(c.to, c.from, (size_t)c.bytes);
  memset(static_cast<unsigned char*>(c.to) + c.bytes, 0, (size_t)(16 - c.bytes));
}
}  // namespace standin
static inline void cp_async16(void* to, const void* from, int bytes = 16) {
  if (bytes < 0 || bytes > 16) ::standin::die("cp.async: bytes outside 0 to 16");
  if ((shared_address(to) | (reinterpret_cast<uintptr_t>(from) & 15)) & 15) {
    ::standin::die("cp.async: an address that is not a multiple of 16 bytes");
  }
  const ::standin::Copy copy{to, from, bytes};
  if (::standin::block->launch->habits.late) ::standin::block->current->copies.push_back(copy);
  else ::standin::finish(copy);
}
static inline void cp_async_commit() {
  ::standin::Fiber& me = *::standin::block->current;
  me.groups.push_back((int)me.copies.size());
}
template <int Pending> static inline void cp_async_wait() {
  ::standin::Fiber& me = *::standin::block->current;
  const int groups = (int)me.groups.size() - Pending;
  if (groups <= 0) return;
  const int copies = me.groups[groups - 1];
  for (int i = 0; i < copies; i++) ::standin::finish(me.copies[i]);
  me.copies.erase(me.copies.begin(), me.copies.begin() + copies);
  me.groups.erase(me.groups.begin(), me.groups.begin() + groups);
  for (int& end : me.groups) end -= copies;
}

// ---- tensor cores
namespace standin {
// Lanes 8m to 8m + 7 name the rows of matrix m; lane l gets the pair l % 4 of its row l / 4 (transposed: of its column).
template <int Matrices, bool Transposed> inline void ldmatrix(uint32_t* registers, const void* row) {
  struct Lane { uint32_t* registers; const void* row; } mine{registers, row};
  const bool named = (block->current->rank & 31) < 8 * Matrices;
  if (named && shared_address(row) & 15) die("ldmatrix: the address of a row is not a multiple of 16 bytes");
  meet_all(16 + Matrices + 8 * Transposed, &mine, [](void** each) {
    for (int m = 0; m < Matrices; m++) {
      uint16_t rows[8][8];
      for (int r = 0; r < 8; r++) memcpy(rows[r], static_cast<Lane*>(each[8 * m + r])->row, 16);
      for (int l = 0; l < 32; l++) {
        const int i = l >> 2, j = 2 * (l & 3);
        const uint32_t low = Transposed ? rows[j][i] : rows[i][j], high = Transposed ? rows[j + 1][i] : rows[i][j + 1];
        static_cast<Lane*>(each[l])->registers[m] = low | high << 16;
      }
    }
  });
}
}  // namespace standin
static inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ::standin::ldmatrix<4, false>(r, row); }
static inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { ::standin::ldmatrix<2, false>(r, row); }
static inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ::standin::ldmatrix<4, true>(r, row); }
static inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { ::standin::ldmatrix<2, true>(r, row); }

static inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Lane { float* d; const uint32_t *a, *b; } mine{d, a, b};
  ::standin::meet_all(32, &mine, [](void** each) {
    alignas(32) float A[16][16], B[16][8], D[16][8];
    for (int l = 0; l < 32; l++) {
      const Lane& lane = *static_cast<Lane*>(each[l]);
      const int row = l >> 2, column = 2 * (l & 3);
      for (int half = 0; half < 2; half++) {
        for (int below = 0; below < 2; below++) {
          A[row + 8 * below][column + 8 * half] = ::standin::low_half(lane.a[2 * half + below]);
          A[row + 8 * below][column + 8 * half + 1] = ::standin::high_half(lane.a[2 * half + below]);
        }
        B[column + 8 * half][row] = ::standin::low_half(lane.b[half]);
        B[column + 8 * half + 1][row] = ::standin::high_half(lane.b[half]);
        memcpy(&D[row + 8 * half][column], lane.d + 2 * half, 8);
      }
    }
    ::standin::add_products(D[0], A[0], B[0], 8, 8);
    for (int l = 0; l < 32; l++) {
      const int row = l >> 2, column = 2 * (l & 3);
      for (int half = 0; half < 2; half++) memcpy(static_cast<Lane*>(each[l])->d + 2 * half, &D[row + 8 * half][column], 8);
    }
  });
}
