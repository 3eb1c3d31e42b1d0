// What compiled kernels touch in memory, a warp's instruction at a time: the figures by which a GPU judges an access.
#pragma once
#include "runtime.h"

namespace standin {

// An instruction that reads or writes memory: its kernel, the line of the source that it comes from, its bytes a lane, its memory,
// whether it writes, and whether ptxas makes one access of it and of the one before it.
struct Site {
  const char *kernel, *file;
  int line, bytes;
  bool shared, writes, joined;
};

// Whether the accesses of a launch are looked at: in a process that has been told to, those of the first of a kernel with this grid.
bool watch(const Launch& launch);
// The running thread touches `bytes` at this address (of shared memory: at this offset).
STANDIN_API void touch(const Site& site, uint64_t address, int bytes);
// The block has ended: what its lanes touched is counted.
void count_accesses();

}  // namespace standin
