// Hopper instructions (sm_90a): mbarrier, bulk tensor copies (TMA), warpgroup products (wgmma). Included by *_sm90.cu only.
#pragma once
#include "prelude.cuh"
#ifndef __CUDACC__
#include "hopper.h"
#else
#include <cuda.h>

// ---- mbarrier in shared memory
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory"); }
// What this thread has written to shared memory so far becomes visible to bulk copies and warpgroup products, once other
// threads are synchronised with it as ever.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Makes initialised barriers visible to the asynchronous proxy; a __syncthreads must follow.
__device__ __forceinline__ void mbarrier_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_proxy_async();
}
// Arrives and expects `bytes` more from bulk copies in this phase.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory"); }
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory"); }
// Waits for the end of the phase of this parity.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile("{\n.reg .pred p;\nW%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra D%=;\nbra W%=;\nD%=:\n}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// ---- bulk tensor copies: a box at (x, y), x along the contiguous dimension
__device__ __forceinline__ void tma_load_2d(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)), "l"((uint64_t)map), "r"(shared_address(barrier)), "r"(x), "r"(y) : "memory");
}

// ---- warpgroup products
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `Pending` committed groups are under way.
template <int Pending> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory"); }
// The same, after which d may be used: the compiler takes the issue of a product, not the wait for it, for what writes d.
template <int Pending, int Count> __device__ __forceinline__ void wgmma_wait(float (&d)[Count]) {
  wgmma_wait<Pending>();
#pragma unroll
  for (int i = 0; i < Count; i++) asm volatile("" : "+f"(d[i])::"memory");
}
#define WGMMA_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
template <bool TransA, bool TransB> __device__ __forceinline__ void wgmma_bf16_n64(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
               "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
               "%32, %33, p, 1, 1, %35, %36;\n}\n"
               : WGMMA_8(d, 0), WGMMA_8(d, 8), WGMMA_8(d, 16), WGMMA_8(d, 24)
               : "l"(a), "l"(b), "r"((int)accumulate), "n"(TransA ? 1 : 0), "n"(TransB ? 1 : 0));
}
template <bool TransA, bool TransB> __device__ __forceinline__ void wgmma_bf16_n128(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
               "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
               "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
               "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
               "%64, %65, p, 1, 1, %67, %68;\n}\n"
               : WGMMA_8(d, 0), WGMMA_8(d, 8), WGMMA_8(d, 16), WGMMA_8(d, 24), WGMMA_8(d, 32), WGMMA_8(d, 40),
                 WGMMA_8(d, 48), WGMMA_8(d, 56)
               : "l"(a), "l"(b), "r"((int)accumulate), "n"(TransA ? 1 : 0), "n"(TransB ? 1 : 0));
}
template <bool TransA, bool TransB> __device__ __forceinline__ void wgmma_bf16_n256(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
               "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
               "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
               "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
               "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
               "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
               "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
               "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
               "%128, %129, p, 1, 1, %131, %132;\n}\n"
               : WGMMA_8(d, 0), WGMMA_8(d, 8), WGMMA_8(d, 16), WGMMA_8(d, 24), WGMMA_8(d, 32), WGMMA_8(d, 40),
                 WGMMA_8(d, 48), WGMMA_8(d, 56), WGMMA_8(d, 64), WGMMA_8(d, 72), WGMMA_8(d, 80), WGMMA_8(d, 88),
                 WGMMA_8(d, 96), WGMMA_8(d, 104), WGMMA_8(d, 112), WGMMA_8(d, 120)
               : "l"(a), "l"(b), "r"((int)accumulate), "n"(TransA ? 1 : 0), "n"(TransB ? 1 : 0));
}
template <bool TransB> __device__ __forceinline__ void wgmma_bf16_n64(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
               "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
               "{%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}\n"
               : WGMMA_8(d, 0), WGMMA_8(d, 8), WGMMA_8(d, 16), WGMMA_8(d, 24)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(TransB ? 1 : 0));
}
template <bool TransB> __device__ __forceinline__ void wgmma_bf16_n128(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
               "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
               "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
               "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
               "{%64,%65,%66,%67}, %68, p, 1, 1, %70;\n}\n"
               : WGMMA_8(d, 0), WGMMA_8(d, 8), WGMMA_8(d, 16), WGMMA_8(d, 24), WGMMA_8(d, 32), WGMMA_8(d, 40),
                 WGMMA_8(d, 48), WGMMA_8(d, 56)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)accumulate), "n"(TransB ? 1 : 0));
}
#undef WGMMA_8
// d = a·b, or d += a·b: m64nNk16, bf16 with f32 sums, both operands in shared memory as wgmma_descriptor says. Trans: the operand's m or n,
// not its k, is contiguous. Element e of d[4·j + e] lies at row 16·(warp mod 4) + lane/4 + 8·(e/2), column 8·j + 2·(lane mod 4) + e mod 2.
template <int N, bool TransA, bool TransB> __device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate = true) {
  static_assert(N == 64 || N == 128 || N == 256, "another width: write it like these");
  if constexpr (N == 64) wgmma_bf16_n64<TransA, TransB>(d, a, b, accumulate);
  else if constexpr (N == 128) wgmma_bf16_n128<TransA, TransB>(d, a, b, accumulate);
  else wgmma_bf16_n256<TransA, TransB>(d, a, b, accumulate);
}
// The same with a in registers: those of a warp are its 16 rows, laid out as for mma_bf16.
template <int N, bool TransB> __device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
  static_assert(N == 64 || N == 128, "another width: write it like these");
  if constexpr (N == 64) wgmma_bf16_n64<TransB>(d, a, b, accumulate);
  else wgmma_bf16_n128<TransB>(d, a, b, accumulate);
}
// Registers of a warpgroup's threads, taken from or given to the other warpgroups.
template <int Registers> __device__ __forceinline__ void registers_increase() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers)); }
template <int Registers> __device__ __forceinline__ void registers_decrease() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers)); }
#endif

// An operand of wgmma in shared memory as bulk copies with the 128-byte swizzle leave it: lines of 128 bytes, groups of 8 lines (1024
// bytes) `group_bytes` apart. If k is contiguous, lines are of m or n, 64 of k wide, and slabs are not read past these 64. If m or n is
// contiguous, lines are of k, 64 of m or n wide, and the next 64 lie `slab_bytes` on. Lines begin at 1024-byte places; steps of 16 in a
// contiguous k add 32 bytes to the address.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* operand, uint32_t slab_bytes, uint32_t group_bytes) {
  return (uint64_t)((shared_address(operand) & 0x3ffff) >> 4) | (uint64_t)(slab_bytes >> 4) << 16 |
         (uint64_t)(group_bytes >> 4) << 32 | 1ull << 62;
}

// Slot of a ring of `Slots` places that are filled and emptied in turn, and the parity of its phase.
template <int Slots> struct Ring {
  uint32_t slot = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == Slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};
