// How a block of threads runs on one CPU thread. Included by kernel files and by the emulated driver.
//
// The threads of a block are fibers that run until they must wait: at a barrier, or at a warp collective (shuffle, ldmatrix, mma, …), where
// the last lane to arrive does the work for all. When no thread is ready, the oldest asynchronous operation that a thread waits for is
// executed; if there is none, the block is deadlocked. Execution is deterministic, so an error shows the same way each time; devices differ
// in which threads and blocks come first.
//
// A block runs until it ends, or until one of its threads sleeps (__nanosleep): then the next one starts, and the started ones are
// interleaved. STANDIN_BLOCKS = n interleaves n blocks from the start, at barriers, fences and atomics.
#pragma once
#include <cstddef>
#include <utility>
#include <vector>
#include "types.h"

#define STANDIN_API __attribute__((visibility("default")))

namespace standin {

constexpr int MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / 32, BARRIERS = 16;
constexpr size_t MAX_SHARED = 232448;
constexpr size_t MAX_ARGUMENTS = 4096;

struct Parameter { uint32_t offset, size; };

// A kernel as EXPORT registers it.
struct Kernel {
  const char* name;
  const char* file;
  int parameters;
  const Parameter* layout;
  size_t argument_bytes;
  void (*call)(const unsigned char* arguments);  // runs one thread
  const void* entry;                             // an address in the kernel's library
  size_t statics_module, statics_bytes;          // thread-local storage of that library: its static shared memory
};

// A device's choices among the behaviours that CUDA allows.
struct Habits {
  bool late;  // asynchronous operations happen when they are waited for, else at once
  bool down;  // high blocks, warps and lanes first, else low ones
  bool noisy;  // approximate instructions are off by as much as the manual allows, else exact
};

struct Launch {
  const Kernel* kernel;
  Habits habits;
  bool hopper;  // has the tensor cores of 9.0, else of 8.0
  dim3 grid, block;
  size_t shared;
  uint64_t ends;  // blocks at each end of the grid that run; 0: all
  alignas(128) unsigned char arguments[MAX_ARGUMENTS];
};

// A pending cp.async of a thread.
struct Copy { void* to; const void* from; int bytes; };

struct Fiber {
  void* stack_pointer;       // null before it starts
  unsigned char* stack;
  uint3 index;
  int rank;                  // within the block
  const void* awaits;        // the mbarrier that it sleeps on
  std::vector<Copy> copies;  // oldest first
  std::vector<int> groups;   // where each committed group of copies ends
};

// A warp collective in progress.
struct Meeting {
  uint32_t mask, arrived;
  int what, worker;          // worker: a lane that takes over because the last one expected has ended
  void* arguments[32];
};

struct Barrier {
  int count, expected;
  uint32_t waiting[MAX_WARPS];
};

struct Hopper;
struct Races;
struct Accesses;

struct Block {
  Fiber* current;
  uint3 index;
  const Launch* launch;
  bool watching;               // whether its accesses are recorded
  unsigned char* dynamic;      // shared memory, aligned to 1024 bytes
  unsigned char* statics;
  std::vector<unsigned char> own_statics;  // while another block runs
  int warps, live;             // live: threads that have not ended
  uint32_t ready[MAX_WARPS], live_lanes[MAX_WARPS];
  Meeting meetings[MAX_WARPS][4];
  Barrier barriers[BARRIERS];
  Fiber fibers[MAX_THREADS];
  Hopper* hopper;
  Races* races;
  Accesses* accesses;
  bool sleeps, takes_turns;
  void* launcher;              // the stack that started the block
  unsigned char* memory;
  std::vector<unsigned char*> free_stacks;
  int stacks;
};

// The block that runs on this CPU thread.
extern __thread Block* block __attribute__((tls_model("initial-exec"))) STANDIN_API;

STANDIN_API void add_kernel(Kernel* kernel);
std::vector<Kernel*> kernels();
STANDIN_API void run(const Launch& launch);
// Faults inside kernels are reported as die() does.
void watch_for_faults();
// Reports an error of the running kernel, with block and thread, and aborts.
[[noreturn]] STANDIN_API void die(const char* why);

// Suspends the running thread until another makes it ready.
STANDIN_API void park();
STANDIN_API void make_ready(Fiber* fiber);
// Yields to other threads and blocks: the thread waits for another block.
STANDIN_API void sleep();
// An atomic access to `place`, or a fence: a synchronization point between blocks.
STANDIN_API void atomic_access(const void* place);
STANDIN_API void fence();
// `threads` = 0: all that have not ended. `wait`: false only counts.
STANDIN_API void barrier(int id, int threads, bool wait);
// Non-null for the lane that does the collective's work and then releases it.
STANDIN_API Meeting* arrive(uint32_t mask, int what, void* arguments);
STANDIN_API void release(Meeting* meeting);

// The lanes of `mask` meet; work(arguments of each lane, lanes) runs once.
template <class Work> inline void meet(uint32_t mask, int what, void* arguments, Work work) {
  if (Meeting* meeting = arrive(mask, what, arguments)) {
    work(meeting->arguments, meeting->arrived);
    release(meeting);
  }
}
// `meet` for instructions that need the whole warp.
template <class Work> inline void meet_all(int what, void* arguments, Work work) {
  meet(~0u, what, arguments, [&](void** each, uint32_t lanes) {
    if (lanes != ~0u) die("an instruction of the whole warp, of which lanes have ended");
    work(each);
  });
}

template <auto kernel> struct Export;
template <class... Types, void (*kernel)(Types...)> struct Export<kernel> {
  struct Layout {
    Parameter of[sizeof...(Types) + 1] = {};
    uint32_t bytes = 0;
    constexpr Layout() {
      const uint32_t sizes[] = {sizeof(Types)..., 0}, aligns[] = {alignof(Types)..., 1};
      for (size_t i = 0; i < sizeof...(Types); i++) {
        of[i] = {(bytes + aligns[i] - 1) / aligns[i] * aligns[i], sizes[i]};
        bytes = of[i].offset + sizes[i];
      }
    }
  };
  static constexpr Layout layout{};
  static_assert(layout.bytes <= MAX_ARGUMENTS);

  template <size_t... I> static void apply(const unsigned char* arguments, std::index_sequence<I...>) {
    kernel(*reinterpret_cast<const Types*>(arguments + layout.of[I].offset)...);
  }
  static void call(const unsigned char* arguments) { apply(arguments, std::index_sequence_for<Types...>{}); }

  Kernel record;
  Export(const char* name, const char* file)
      : record{name, file, (int)sizeof...(Types), layout.of, layout.bytes, call, (const void*)kernel, 0, 0} {
    add_kernel(&record);
  }
};

}  // namespace standin
