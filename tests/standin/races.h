// Whether something orders what the threads of a block do with a place of shared memory: the happens-before relation, by vector clocks
// (Flanagan and Freund, "FastTrack", PLDI 2009). It does not depend on what ran first. Looked at with accesses, in compiled kernels.
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
// A product of the running thread's warp reads 16 bytes from now until its group has been waited for.
STANDIN_API void product_reads(const unsigned char* at);
STANDIN_API void commit_reads();
STANDIN_API void finish_reads(int pending);
// These lanes of the running thread's warp wait for each other.
void lanes_meet(uint32_t lanes);

}  // namespace standin
