// The counterpart of every wrapper of kernels/prelude_sm90.cuh: mbarriers, bulk tensor copies (TMA), warpgroup products (wgmma), as the
// PTX manual (ISA 9.0) specifies them. Proxy rules are checked: a bulk store or a product must not read what a thread has written to shared
// memory since its last fence.proxy.async, and nothing may overwrite what a bulk store has still to read. Writes that are seen: stmatrix,
// and in compiled kernels every store.
#pragma once
#include <deque>
#include <initializer_list>
#include <list>
#include <unordered_map>
#include "device.h"

struct alignas(64) CUtensorMap { uint64_t opaque[16]; };

namespace standin {

// What cuTensorMapEncodeTiled writes. Dimension 0 is the contiguous one; strides (of the others) are bytes.
struct TensorMap {
  unsigned char* base;
  uint64_t size[5], stride[4];
  uint16_t box[5];
  uint8_t rank, element, swizzle;  // swizzle: 0 none, 1, 2, 3: within 32, 64, 128 bytes
  bool f32;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

struct TensorCopy {
  TensorMap map;
  unsigned char* shared;
  uint64_t* barrier;  // null for a store
  int at[5];
  bool adds;          // a store that adds to the tensor
};

// Address of a 16-byte chunk of shared memory under a swizzle: its index in the line xor the line's number.
inline unsigned char* swizzled(unsigned char* p, int swizzle) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return reinterpret_cast<unsigned char*>(address ^ ((address >> 7 & ((1u << swizzle) - 1)) << 4));
}

// One wgmma of one warp: 16 of the 64 rows.
struct Accumulator;
struct Product {
  int columns;
  bool trans_a, trans_b, in_registers, accumulate;
  uint64_t a, b;                  // descriptors
  Accumulator* to;
  const uint32_t* fragments[32];  // a, where it is in registers
  uint32_t registers[32][4];      // what these held
};
// Accumulator registers of a warp's products in flight; until these are waited for, threads see NaN in them.
struct Accumulator {
  float* registers[32];
  int columns, products, first_row;
  alignas(32) float sums[16][256];
  void take();
  void give() const;
};
struct WarpProducts {
  bool fenced;
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::list<Accumulator> accumulators;
};

// Steps that all four warps of a warpgroup must execute in the same order; those that some have not reached yet.
struct Step {
  int what;
  uint64_t a, b;
};
struct Warpgroup {
  std::deque<Step> steps;
  size_t first, done[4];  // steps in front of `steps`, and those that each warp has done
};

// A block's asynchronous operations in flight.
struct Hopper {
  std::vector<TensorCopy> loads;
  std::vector<TensorCopy> stores[MAX_THREADS];
  std::vector<int> store_groups[MAX_THREADS];
  WarpProducts products[MAX_WARPS];
  // Shared memory that bulk stores have still to read, and their threads, in order.
  struct Reading { const unsigned char *start, *end; int rank; };
  std::vector<Reading> reading;
  // 8-byte chunks of shared memory that threads have written since their last fence, with the number of such writes.
  std::vector<uintptr_t> written[MAX_THREADS];
  std::unordered_map<uintptr_t, int> unfenced;
  bool barriers_fenced;
  Warpgroup warpgroups[MAX_WARPS / 4];
  int registers[MAX_WARPS], free_registers;  // of each thread of a warp; of the block, in registers of a warp's thread
  void start();
  void finish();
};

STANDIN_API void mbarrier_add(uint64_t* barrier, int arrivals, int64_t bytes);
STANDIN_API void mbarrier_start(uint64_t* barrier, uint32_t arrivals);
STANDIN_API void mbarrier_sleep(uint64_t* barrier, uint32_t parity);
STANDIN_API void tensor_load(void* to, const CUtensorMap* map, uint64_t* barrier, std::initializer_list<int> at);
STANDIN_API void tensor_store(const CUtensorMap* map, const void* from, std::initializer_list<int> at, bool adds = false);
STANDIN_API void store_commit();
// Waits until at most `pending` bulk groups of this thread have still to read shared memory.
STANDIN_API void store_wait(int pending);
// The running thread has written so many bytes of shared memory; all that it has written is fenced; the asynchronous proxy reads.
STANDIN_API void write_unfenced(const void* at, int bytes);
STANDIN_API void fence_writes();
STANDIN_API void read_fenced(const void* at, int bytes);
STANDIN_API void product_issue(float* const* d, Product product);
STANDIN_API void product_commit();
STANDIN_API void product_wait(int pending);
STANDIN_API bool finish_awaited_copy();
// setmaxnreg: released registers go to the block's pool.
STANDIN_API void registers_change(int to, bool increase);

template <int N, bool TransA, bool TransB, bool InRegisters>
inline void wgmma(float (&d)[N / 2], const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  struct Lane { float* d; const uint32_t* a; } mine{d, a_registers};
  const int what = 1024 + N + 512 * TransA + 1024 * TransB + 2048 * InRegisters;
  meet_all(what, &mine, [&](void** each) {
    Product product{N, TransA, TransB, InRegisters, accumulate, a, b, nullptr, {}, {}};
    float* registers[32];
    for (int l = 0; l < 32; l++) {
      const Lane& lane = *static_cast<Lane*>(each[l]);
      registers[l] = lane.d;
      product.fragments[l] = lane.a;
      if (InRegisters) memcpy(product.registers[l], lane.a, sizeof product.registers[l]);
    }
    product_issue(registers, product);
  });
}

// The reverse of ldmatrix.
inline void stmatrix(void* row, const uint32_t* registers) {
  struct Lane { void* row; const uint32_t* registers; } mine{row, registers};
  if (shared_address(row) & 15) die("stmatrix: the address of a row is not a multiple of 16 bytes");
  write_unfenced(row, 16);
  meet_all(40, &mine, [](void** each) {
    for (int m = 0; m < 4; m++) {
      for (int l = 0; l < 32; l++) {
        auto* to = static_cast<unsigned char*>(static_cast<Lane*>(each[8 * m + l / 4])->row);
        memcpy(to + 4 * (l & 3), static_cast<Lane*>(each[l])->registers + m, 4);
      }
    }
  });
}

}  // namespace standin

// ---- mbarrier
static inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { ::standin::mbarrier_start(barrier, arrivals); }
static inline void fence_proxy_async() { ::standin::fence_writes(); }
static inline void mbarrier_fence_init() {
  ::standin::block->hopper->barriers_fenced = true;
  fence_proxy_async();
}
static inline void mbarrier_expect(uint64_t* barrier, uint32_t bytes) { ::standin::mbarrier_add(barrier, 1, bytes); }
static inline void mbarrier_arrive(uint64_t* barrier) { ::standin::mbarrier_add(barrier, 1, 0); }
static inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { ::standin::mbarrier_sleep(barrier, parity); }

// ---- bulk tensor copies
static inline void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  ::standin::tensor_load(to, map, barrier, {x, y});
}
static inline void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
  ::standin::tensor_load(to, map, barrier, {x, y, z});
}
static inline void tma_store_3d(const CUtensorMap* map, const void* from, int x, int y, int z) {
  ::standin::tensor_store(map, from, {x, y, z});
}
static inline void tma_add_3d(const CUtensorMap* map, const void* from, int x, int y, int z) {
  ::standin::tensor_store(map, from, {x, y, z}, true);
}
static inline void tma_store_commit() { ::standin::store_commit(); }
template <int Pending> static inline void tma_store_wait_read() { ::standin::store_wait(Pending); }
static inline void stmatrix_x4(void* row, const uint32_t (&r)[4]) { ::standin::stmatrix(row, r); }

// ---- warpgroup products
static inline void wgmma_fence() {
  ::standin::meet_all(48, nullptr, [](void**) {
    ::standin::block->hopper->products[::standin::block->current->rank >> 5].fenced = true;
  });
}
static inline void wgmma_commit() {
  ::standin::meet_all(49, nullptr, [](void**) { ::standin::product_commit(); });
}
template <int Pending> static inline void wgmma_wait() {
  ::standin::meet_all(50, nullptr, [](void**) { ::standin::product_wait(Pending); });
}
template <int Pending, int Count> static inline void wgmma_wait(float (&)[Count]) { wgmma_wait<Pending>(); }
template <int N, int TransA, int TransB>
static inline void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  ::standin::wgmma<N, TransA != 0, TransB != 0, false>(d, nullptr, a, b, accumulate);
}
// a in registers, laid out as for mma_bf16.
template <int N, int TransB>
static inline void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
  ::standin::wgmma<N, false, TransB != 0, true>(d, a, 0, b, accumulate);
}
template <int Registers> static inline void registers_increase() { ::standin::registers_change(Registers, true); }
template <int Registers> static inline void registers_decrease() { ::standin::registers_change(Registers, false); }
