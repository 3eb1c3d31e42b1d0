// Memory accesses of compiled kernels, an instruction of a warp at a time, in the units of a GPU's counters.
#pragma once
#include "runtime.h"

namespace standin {

// A load or store instruction: kernel, source line, bytes a lane, memory space, direction, and whether ptxas merges it with the one
// before it.
struct Site {
  const char *kernel, *file;
  int line, bytes;
  bool shared, writes, joined;
};

// Whether the accesses of a launch are watched: if watching is on, those of a kernel's first launch with this grid.
bool watch(const Launch& launch);
// Records that the running thread touches `bytes` at this address (shared memory: at this offset).
STANDIN_API void touch(const Site& site, uint64_t address, int bytes);
// Counts what the lanes of a block touched, when it has ended.
void count_accesses();

}  // namespace standin
