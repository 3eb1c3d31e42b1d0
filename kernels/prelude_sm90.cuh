// Hopper instructions (sm_90a): mbarrier, bulk tensor copies (TMA), stmatrix, warpgroup products (wgmma). Included by
// *_sm90.cu only.
#pragma once
#include "prelude.cuh"
#ifndef __CUDACC__
#include "hopper.h"
#else
#include <cuda.h>

// ---- mbarrier in shared memory
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes what this thread has written to shared memory visible to bulk copies and warpgroup products of threads that are
// synchronised with it.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Makes initialised barriers visible to the asynchronous proxy; a __syncthreads must follow.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_proxy_async();
}
// Arrives and expects `bytes` more from bulk copies in this phase.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits for the end of the phase of this parity.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred p;\nW%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D%=;\nbra W%=;\nD%=:\n}"
      ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// ---- bulk tensor copies: a box at (x, y, z), x along the contiguous dimension. Outside the tensor it is read as zeros
// and not written.
__device__ __forceinline__ void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      ::"r"(shared_address(to)), "l"((uint64_t)map), "r"(shared_address(barrier)), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(shared_address(to)), "l"((uint64_t)map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z) : "memory");
}
__device__ __forceinline__ void tma_store_3d(const CUtensorMap* map, const void* from, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
               ::"l"((uint64_t)map), "r"(shared_address(from)), "r"(x), "r"(y), "r"(z) : "memory");
}
// Adds to the tensor, each element rounded once; f32 that are subnormal count as zeros.
__device__ __forceinline__ void tma_add_3d(const CUtensorMap* map, const void* from, int x, int y, int z) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
               ::"l"((uint64_t)map), "r"(shared_address(from)), "r"(x), "r"(y), "r"(z) : "memory");
}
// Stores since the last commit of this thread become a group.
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most `Pending` groups of this thread have still to read shared memory.
template <int Pending> __device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// The reverse of ldmatrix_x4: lane l names row l mod 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
               ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// ---- warpgroup products
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `Pending` committed groups are under way.
template <int Pending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// The same, after which d may be used: for the compiler the issue of a product writes d, not the wait for it.
template <int Pending, int Count> __device__ __forceinline__ void wgmma_wait(float (&d)[Count]) {
  wgmma_wait<Pending>();
#pragma unroll
  for (int i = 0; i < Count; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// The sums of a product as text and as operands of asm.
#define WGMMA_TEXT_64 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_TEXT_128 \
  WGMMA_TEXT_64 \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_TEXT_256 \
  WGMMA_TEXT_128 \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95" \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA_2(d, i) "+f"(d[i]), "+f"(d[i + 1])
#define WGMMA_8(d, i) WGMMA_2(d, i), WGMMA_2(d, i + 2), WGMMA_2(d, i + 4), WGMMA_2(d, i + 6)
#define WGMMA_32(d, i) WGMMA_8(d, i), WGMMA_8(d, i + 8), WGMMA_8(d, i + 16), WGMMA_8(d, i + 24)
#define WGMMA_SUMS_64(d) WGMMA_32(d, 0)
#define WGMMA_SUMS_128(d) WGMMA_32(d, 0), WGMMA_32(d, 32)
#define WGMMA_SUMS_256(d) WGMMA_SUMS_128(d), WGMMA_32(d, 64), WGMMA_32(d, 96)
// Products of m64nNk16; P0 …: numbers of the operands behind the sums.
#define WGMMA_SHAPE(N, P0, P1, P2, P3, P4, P5, P6)                                                                     \
  template <bool TransA, bool TransB>                                                                                  \
  __device__ __forceinline__ void wgmma_issue(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P2 ", 0;\n"                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_TEXT_##N "}, "                     \
                 "%" #P0 ", %" #P1 ", p, 1, 1, %" #P3 ", %" #P4 ";\n}\n"                                               \
                 : WGMMA_SUMS_##N(d)                                                                                   \
                 : "l"(a), "l"(b), "r"((int)accumulate), "n"(TransA ? 1 : 0), "n"(TransB ? 1 : 0));                    \
  }                                                                                                                    \
  template <bool TransB>                                                                                               \
  __device__ __forceinline__ void wgmma_issue(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,                   \
                                              bool accumulate) {                                                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P5 ", 0;\n"                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" WGMMA_TEXT_##N "}, "                     \
                 "{%" #P0 ",%" #P1 ",%" #P2 ",%" #P3 "}, %" #P4 ", p, 1, 1, %" #P6 ";\n}\n"                            \
                 : WGMMA_SUMS_##N(d)                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(TransB ? 1 : 0));     \
  }
WGMMA_SHAPE(64, 32, 33, 34, 35, 36, 37, 38)
WGMMA_SHAPE(128, 64, 65, 66, 67, 68, 69, 70)
WGMMA_SHAPE(256, 128, 129, 130, 131, 132, 133, 134)
#undef WGMMA_SHAPE
#undef WGMMA_TEXT_64
#undef WGMMA_TEXT_128
#undef WGMMA_TEXT_256
#undef WGMMA_2
#undef WGMMA_8
#undef WGMMA_32
#undef WGMMA_SUMS_64
#undef WGMMA_SUMS_128
#undef WGMMA_SUMS_256
// d = a·b, or d += a·b: m64nNk16 (N: 64, 128 or 256), bf16 with f32 sums, both operands in shared memory as
// wgmma_descriptor says. Trans: the operand's m or n, not its k, is contiguous. Element e of d[4·j + e] lies at row
// 16·(warp mod 4) + lane/4 + 8·(e/2), column 8·j + 2·(lane mod 4) + e mod 2.
template <int N, bool TransA, bool TransB>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  wgmma_issue<TransA, TransB>(d, a, b, accumulate);
}
// The same with a in registers: those of a warp are its 16 rows, laid out as for mma_bf16.
template <int N, bool TransB>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                           bool accumulate = true) {
  wgmma_issue<TransB>(d, a, b, accumulate);
}
// Registers of a warpgroup's threads, taken from or given to the other warpgroups.
template <int Registers> __device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers> __device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
#endif

// An operand of wgmma in shared memory as bulk copies with the 128-byte swizzle leave it: lines of 128 bytes, groups
// of 8 lines (1024 bytes) `group_bytes` apart. If k is contiguous, lines are of m or n, 64 of k wide, and slabs are
// not read past these 64. If m or n is contiguous, lines are of k, 64 of m or n wide, and the next 64 lie `slab_bytes`
// on. Lines begin at multiples of 1024 bytes; steps of 16 in a contiguous k add 32 bytes to the address.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* operand, uint32_t slab_bytes, uint32_t group_bytes) {
  return (uint64_t)((shared_address(operand) & 0x3ffff) >> 4) | (uint64_t)(slab_bytes >> 4) << 16 |
         (uint64_t)(group_bytes >> 4) << 32 | 1ull << 62;
}

// Slot of a ring of `Slots` buffers that are filled and emptied in turn, and the parity of its phase.
template <int Slots> struct Ring {
  uint32_t slot = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == Slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};
