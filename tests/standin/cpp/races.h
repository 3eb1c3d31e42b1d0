// A race detector: happens-before by vector clocks (Flanagan and Freund, "FastTrack", PLDI 2009), which does not depend on what ran
// first. It watches compiled kernels: shared memory by threads; global memory by blocks, which fences and atomics order as the PTX manual's
// memory model says.
//
// The products of a warp count as a thread of their own: ordered after what all its lanes know has happened, and before what a lane does
// once it has waited for them.
#pragma once
#include "accesses.h"

namespace standin {

// A block of `threads` starts.
void begin_races(int threads);
// The running thread reads or writes shared memory at `at`. Dies if that is a race.
STANDIN_API void order(const Site* site, const unsigned char* at, int bytes, bool writes);
// Release: what the running thread has done happens before what acquires from `place`.
void release_to(const void* place);
// A phase of `place` (a barrier) ends: what has been released to it can be acquired.
void end_phase(const void* place);
void acquire_from(const void* place, int rank);
// A product of the running thread's warp starts; it reads each 16 bytes until its group has been waited for.
void begin_product();
void product_reads(const unsigned char* at);
STANDIN_API void commit_reads();
STANDIN_API void finish_reads(int pending);
// These lanes of the running warp synchronize.
void lanes_meet(uint32_t lanes);

// A launch starts.
void begin_grid();
// The running block reads or writes global memory. Dies if that races with another block.
STANDIN_API void order_between_blocks(const Site* site, uint64_t at, int bytes, bool writes);
// A fence: what the block has done happens before its later atomics; what others did before their fences happens before what it does now,
// if it has seen their atomics.
void fence_between_blocks();
void atomic_between_blocks(const void* place);

}  // namespace standin
