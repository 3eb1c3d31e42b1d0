// Whether something orders what threads do with a place of memory: the happens-before relation, by vector clocks (Flanagan and Freund,
// "FastTrack", PLDI 2009). It does not depend on what ran first. Looked at with accesses, in compiled kernels: shared memory by threads,
// global memory by blocks, which fences and atomics order as the PTX manual's memory model says.
//
// The products of a warp are a thread of their own. What its lanes all know has happened comes before them; that they have read their
// operands is known to the lanes that have waited for them.
#pragma once
#include "accesses.h"

namespace standin {

// A block of so many threads begins.
void begin_races(int threads);
// The running thread reads or writes bytes of shared memory from this place on. Dies where that may happen at the same time as a write,
// or, if it is one, as a read.
STANDIN_API void order(const Site* site, const unsigned char* at, int bytes, bool writes);
// What the running thread has done comes before whatever acquires from the place.
void release_to(const void* place);
// A phase of the place ends: what has been released to it comes before what threads do that acquire from it.
void end_phase(const void* place);
void acquire_from(const void* place, int rank);
// A product of the running thread's warp is issued, and reads 16 bytes from now until its group has been waited for.
void begin_product();
void product_reads(const unsigned char* at);
STANDIN_API void commit_reads();
STANDIN_API void finish_reads(int pending);
// These lanes of the running thread's warp wait for each other.
void lanes_meet(uint32_t lanes);

// The blocks of a launch begin.
void begin_grid();
// The running block reads or writes bytes of global memory. Dies where another block may do so at the same time, and one of them writes.
STANDIN_API void order_between_blocks(const Site* site, uint64_t at, int bytes, bool writes);
// A fence orders what the block has done before the atomics after it, and what others did before their fences, and the atomics that it
// has seen, before what it does now.
void fence_between_blocks();
void atomic_between_blocks(const void* place);

}  // namespace standin
