// The scheduler: fibers, barriers, warp collectives, and the loop over a grid's blocks.
#include "runtime.h"
#include <link.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include "hopper.h"
#include "races.h"

// Switches stacks; saves the callee-saved registers.
extern "C" void standin_switch(void** save, void* load);
asm(R"(.text
.globl standin_switch
.hidden standin_switch
.type standin_switch,@function
standin_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

extern "C" void* __tls_get_addr(size_t (&module_and_offset)[2]);

namespace standin {

__thread Block* block = nullptr;

namespace {

// The odd part of the stride spreads the stacks' tops over the sets of the cache.
constexpr size_t STACK = 128 * 1024 + 320, CANARY = 1024;
constexpr unsigned char POISON = 0xff, MARK = 0xc7;

// The next set bit after `after`, cyclically, upwards or downwards.
int next_bit(uint32_t bits, int after, bool down) {
  if (down) {
    const uint32_t below = bits & ((1u << after) - 1);
    return 31 - __builtin_clz(below ? below : bits);
  }
  const uint32_t above = bits & ~((2u << after) - 1);
  return __builtin_ctz(above ? above : bits);
}

// Prefers a thread of this warp, then of the next warp that has a ready one.
Fiber* next_ready() {
  const bool down = block->launch->habits.down;
  const int warp = block->current->rank >> 5, lane = block->current->rank & 31;
  if (block->ready[warp]) return &block->fibers[warp * 32 + next_bit(block->ready[warp], lane, down)];
  for (int i = 1; i < block->warps; i++) {
    const int other = (warp + (down ? block->warps - i : i)) % block->warps;
    if (block->ready[other]) return &block->fibers[other * 32 + next_bit(block->ready[other], down ? 0 : 31, down)];
  }
  return nullptr;
}

Fiber* next_or_progress() {
  for (;;) {
    if (Fiber* next = next_ready()) return next;
    if (!finish_awaited_copy()) die("deadlock: every thread waits at a barrier, a warp collective or an mbarrier");
  }
}

void fiber_main();

void begin_on(Fiber* fiber, unsigned char* stack) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + STACK) & ~uintptr_t(15));
  top[-2] = reinterpret_cast<void*>(fiber_main);
  for (int i = 3; i <= 8; i++) top[-i] = nullptr;
  fiber->stack = stack;
  fiber->stack_pointer = top - 8;
}

unsigned char* take_stack() {
  if (block->free_stacks.empty()) {
    unsigned char* stack = block->memory + STACK * block->stacks++;
    memset(stack, MARK, 64);
    return stack;
  }
  unsigned char* stack = block->free_stacks.back();
  block->free_stacks.pop_back();
  return stack;
}

void switch_to(Fiber* next) {
  Fiber* me = block->current;
  if (next == me) return;
  if (!next->stack_pointer) begin_on(next, take_stack());
  block->current = next;
  standin_switch(&me->stack_pointer, next->stack_pointer);
}

// The collective that orders memory between lanes: __syncwarp.
bool orders_memory(int what) { return what == 1; }

void open_barrier(Barrier& b) {
  if (block->watching) {
    end_phase(&b);
    for (int i = 0; i < block->warps * 32; i++) {
      if (b.waiting[i >> 5] >> (i & 31) & 1) acquire_from(&b, i);
    }
  }
  for (int w = 0; w < block->warps; w++) block->ready[w] |= b.waiting[w], b.waiting[w] = 0;
  b.count = b.expected = 0;
}

// Removes a thread that has returned from the kernel.
void retire() {
  Fiber& me = *block->current;
  const int warp = me.rank >> 5;
  const uint32_t bit = 1u << (me.rank & 31);
  if (!me.copies.empty()) die("the thread ends with a cp.async that it has not waited for");
  for (int i = 0; i < 64; i++) {
    if (me.stack[i] != MARK) die("the thread's stack is full");
  }
  block->live--;
  block->ready[warp] &= ~bit;
  block->live_lanes[warp] &= ~bit;
  Barrier& all = block->barriers[0];
  if (all.count && all.count == block->live) open_barrier(all);
  for (Meeting& m : block->meetings[warp]) {
    if (!m.arrived || m.arrived != (m.mask & block->live_lanes[warp])) continue;
    m.worker = __builtin_ctz(m.arrived);
    block->ready[warp] |= 1u << m.worker;
  }
}

// Body of a stack: threads that never wait run on it one after another without a switch.
void fiber_main() {
  for (;;) {
    block->launch->kernel->call(block->launch->arguments);
    retire();
    void* unused;
    if (block->live == 0) standin_switch(&unused, block->launcher);
    Fiber* next = next_or_progress();
    unsigned char* stack = block->current->stack;
    block->current = next;
    if (next->stack_pointer) {
      block->free_stacks.push_back(stack);
      standin_switch(&unused, next->stack_pointer);
    }
    next->stack = stack;
    next->stack_pointer = stack;  // started; the switch that leaves it sets the true value
  }
}

// Yields to the loop over blocks, and continues when it is this block's turn.
void give_turn() { standin_switch(&block->current->stack_pointer, block->launcher); }

// Starts the block.
void begin_block() {
  Block& b = *block;
  const Launch& l = *b.launch;
  const int threads = (int)(l.block.x * l.block.y * l.block.z);
  b.live = threads;
  b.warps = (threads + 31) / 32;
  memset(b.barriers, 0, sizeof b.barriers);
  memset(b.dynamic, POISON, l.shared);
  memset(b.dynamic + l.shared, MARK, CANARY);
  memset(b.statics, POISON, l.kernel->statics_bytes);
  b.hopper->start();
  for (int i = 0; i < threads; i++) {
    Fiber& f = b.fibers[i];
    f.stack_pointer = nullptr;
    f.awaits = nullptr;
    f.rank = i;
    f.index = {i % l.block.x, i / l.block.x % l.block.y, i / (l.block.x * l.block.y)};
    f.copies.clear();
    f.groups.clear();
  }
  for (int w = 0; w < b.warps; w++) {
    const int lanes = threads - w * 32;
    b.ready[w] = b.live_lanes[w] = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    for (Meeting& m : b.meetings[w]) m.arrived = 0, m.worker = -1;
  }
  if (block->watching) begin_races(threads);
  b.current = &b.fibers[l.habits.down ? threads - 1 : 0];
  begin_on(b.current, take_stack());
}

void end_block() {
  Block& b = *block;
  const Launch& l = *b.launch;
  b.free_stacks.push_back(b.current->stack);
  b.hopper->finish();
  count_accesses();
  for (size_t i = 0; i < CANARY; i++) {
    if (b.dynamic[l.shared + i] != MARK) die("write past the end of dynamic shared memory");
  }
}

std::mutex idle_lock;
std::vector<Block*> idle;

Block* take_block() {
  {
    std::lock_guard<std::mutex> guard(idle_lock);
    if (!idle.empty()) {
      Block* b = idle.back();
      idle.pop_back();
      return b;
    }
  }
  Block* b = new Block();
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
  void* dynamic = aligned_alloc(1024, MAX_SHARED + CANARY);
  if (memory == MAP_FAILED || !dynamic) die("no memory for a block");
  b->memory = static_cast<unsigned char*>(memory);
  b->dynamic = static_cast<unsigned char*>(dynamic);
  b->hopper = new Hopper();
  return b;
}

std::vector<Kernel*>& all_kernels() {
  static std::vector<Kernel*> kernels;
  return kernels;
}

// Reports a fault inside a kernel with block and thread; other faults go to the previous handler.
struct sigaction before[NSIG];
void on_fault(int number, siginfo_t* info, void* context) {
  if (block) {
    char text[128];
    if (number == SIGILL) snprintf(text, sizeof text, "misaligned access, or an index past an array's end");
    else snprintf(text, sizeof text, "illegal address %p", info->si_addr);
    die(text);
  }
  struct sigaction& old = before[number];
  if (old.sa_flags & SA_SIGINFO) old.sa_sigaction(number, info, context);
  else if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) old.sa_handler(number);
  else signal(number, SIG_DFL);
}

}  // namespace

void watch_for_faults() {
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(number, &action, &before[number]);
}

void die(const char* why) {
  char text[512] = "";
  int length = 0;
  if (block) {
    const uint3 b = block->index, t = block->current ? block->current->index : uint3{};
    length = snprintf(text, sizeof text, "stand-in GPU: %s: %s, block (%u, %u, %u), thread (%u, %u, %u)\n",
                      block->launch->kernel->name, why, b.x, b.y, b.z, t.x, t.y, t.z);
  } else {
    length = snprintf(text, sizeof text, "stand-in GPU: %s\n", why);
  }
  if (write(2, text, (size_t)length) < 0) _exit(134);
  block = nullptr;
  abort();
}

void sleep() {
  Block& b = *block;
  b.sleeps = true;
  give_turn();
  // Threads of other warps first.
  const int warp = b.current->rank >> 5;
  for (int i = 1; i <= b.warps; i++) {
    const int other = (warp + i) % b.warps;
    if (!b.ready[other]) continue;
    return switch_to(&b.fibers[other * 32 + next_bit(b.ready[other], other == warp ? b.current->rank & 31 : 31, false)]);
  }
}

void atomic_access(const void* place) {
  const auto* byte = static_cast<const unsigned char*>(place);
  const auto within = [&](const unsigned char* start, size_t bytes) { return byte >= start && byte < start + bytes; };
  if (within(block->dynamic, MAX_SHARED) || within(block->statics, block->launch->kernel->statics_bytes)) return;
  if (block->watching) atomic_between_blocks(place);
  if (block->takes_turns) give_turn();
}

void fence() {
  if (block->watching) fence_between_blocks();
  if (block->takes_turns) give_turn();
}

void park() {
  block->ready[block->current->rank >> 5] &= ~(1u << (block->current->rank & 31));
  switch_to(next_or_progress());
}

void make_ready(Fiber* fiber) { block->ready[fiber->rank >> 5] |= 1u << (fiber->rank & 31); }

void barrier(int id, int threads, bool wait) {
  if (id < 0 || id >= BARRIERS || threads % 32 || threads < 0) die("barrier: id 0 to 15, threads a multiple of 32");
  Barrier& b = block->barriers[id];
  if (b.count && b.expected != threads) die("barrier: threads do not agree on their number");
  b.expected = threads;
  if (block->watching) release_to(&b);
  if (wait) b.waiting[block->current->rank >> 5] |= 1u << (block->current->rank & 31);
  if (++b.count == (threads ? threads : block->live)) {
    open_barrier(b);
    if (block->takes_turns) give_turn();
    return;
  }
  if (wait) park();
}

Meeting* arrive(uint32_t mask, int what, void* arguments) {
  const int warp = block->current->rank >> 5, lane = block->current->rank & 31;
  if (!(mask >> lane & 1)) die("a lane is not in the mask of its own warp collective");
  Meeting* meeting = nullptr;
  for (Meeting& m : block->meetings[warp]) {
    if (m.arrived && m.mask == mask) meeting = &m;
    else if (m.arrived & mask) die("lanes of one warp collective name different masks");
  }
  if (!meeting) {
    for (Meeting& m : block->meetings[warp]) {
      if (!m.arrived) meeting = &m;
    }
    if (!meeting) die("too many warp collectives of one warp at a time");
    meeting->mask = mask;
    meeting->what = what;
    meeting->worker = -1;
  }
  if (meeting->what != what) die("lanes of one warp meet in different collectives");
  meeting->arguments[lane] = arguments;
  meeting->arrived |= 1u << lane;
  if (meeting->arrived == (mask & block->live_lanes[warp])) return meeting;
  park();
  if (meeting->worker == lane && meeting->arrived) return meeting;
  return nullptr;
}

void release(Meeting* meeting) {
  if (block->watching && orders_memory(meeting->what)) lanes_meet(meeting->arrived);
  block->ready[block->current->rank >> 5] |= meeting->arrived;
  meeting->arrived = 0;
  meeting->worker = -1;
}

namespace {

// The started blocks of a launch. Static shared memory exists once; at any time it is that of `inside`.
struct Grid {
  const Launch& launch;
  uint64_t started = 0;
  std::vector<Block*> blocks;
  Block* inside = nullptr;

  uint64_t all() const { return (uint64_t)launch.grid.x * launch.grid.y * launch.grid.z; }
  // The blocks to run: all, or `ends` at each end of the grid.
  uint64_t size() const { return launch.ends && 2 * launch.ends < all() ? 2 * launch.ends : all(); }
  void enter(Block* b) {
    const size_t bytes = launch.kernel->statics_bytes;
    if (inside && inside != b) inside->own_statics.assign(inside->statics, inside->statics + bytes);
    if (inside != b && !b->own_statics.empty()) memcpy(b->statics, b->own_statics.data(), bytes);
    block = inside = b;
  }
  void start(bool watching, bool takes_turns) {
    const uint64_t i = started < size() / 2 ? started : all() - (size() - started);
    const uint64_t at = launch.habits.down ? all() - 1 - i : i, row = launch.grid.x, slice = row * launch.grid.y;
    started++;
    Block* b = take_block();
    size_t module_start[2] = {launch.kernel->statics_module, 0};
    b->statics = launch.kernel->statics_bytes ? static_cast<unsigned char*>(__tls_get_addr(module_start)) : b->dynamic;
    b->launch = &launch;
    b->index = {(unsigned)(at % row), (unsigned)(at / row % launch.grid.y), (unsigned)(at / slice)};
    b->own_statics.clear();
    b->watching = watching, b->takes_turns = takes_turns;
    blocks.push_back(b);
    enter(b);
    begin_block();
  }
  // Runs a block until it yields or ends. Returns whether it sleeps.
  bool go_on(size_t i) {
    enter(blocks[i]);
    block->sleeps = false;
    standin_switch(&block->launcher, block->current->stack_pointer);
    if (block->live) return block->sleeps;
    end_block();
    blocks.erase(blocks.begin() + (ptrdiff_t)i);
    inside = nullptr;
    std::lock_guard<std::mutex> guard(idle_lock);
    idle.push_back(block);
    return false;
  }
};

// Maximum number of started blocks, and rounds of all of them sleeping after which it is a deadlock.
constexpr size_t MOST_BLOCKS = 132, ROUNDS = 1000;

}  // namespace

void run(const Launch& launch) {
  static const size_t together = [] {
    const char* text = getenv("STANDIN_BLOCKS");
    return std::max<size_t>(1, text ? (size_t)atoi(text) : 1);
  }();
  Grid grid{launch};
  const bool watching = watch(launch);
  if (watching) begin_grid();
  size_t turn = 0, asleep = 0;
  while (grid.started < grid.size() || !grid.blocks.empty()) {
    const size_t others = grid.blocks.size();
    const bool all_sleep = others && asleep >= others && others < MOST_BLOCKS;
    if (grid.started < grid.size() && (others < together || all_sleep)) {
      grid.start(watching, together > 1);
      asleep = 0;
    } else if (asleep > ROUNDS * others) {
      die("deadlock: every block waits for another");
    }
    turn = launch.habits.down ? (turn + grid.blocks.size() - 1) : turn + 1;
    turn %= grid.blocks.size();
    asleep = grid.go_on(turn) ? asleep + 1 : 0;
  }
  block = nullptr;
}

void add_kernel(Kernel* kernel) {
  struct Found { Kernel* kernel; } found{kernel};
  dl_iterate_phdr([](dl_phdr_info* info, size_t, void* data) {
    Kernel& k = *static_cast<Found*>(data)->kernel;
    const auto entry = reinterpret_cast<uintptr_t>(k.entry);
    bool mine = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
      const auto& segment = info->dlpi_phdr[i];
      const uintptr_t start = info->dlpi_addr + segment.p_vaddr;
      mine |= segment.p_type == PT_LOAD && entry >= start && entry < start + segment.p_memsz;
    }
    for (int i = 0; mine && i < info->dlpi_phnum; i++) {
      if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
      k.statics_module = info->dlpi_tls_modid;
      k.statics_bytes = info->dlpi_phdr[i].p_memsz;
    }
    return (int)mine;
  }, &found);
  std::lock_guard<std::mutex> guard(idle_lock);
  all_kernels().push_back(kernel);
}

std::vector<Kernel*> kernels() {
  std::lock_guard<std::mutex> guard(idle_lock);
  return all_kernels();
}

}  // namespace standin
