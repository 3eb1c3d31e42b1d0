#include "races.h"
#include <algorithm>
#include <cstdio>
#include <memory>
#include <unordered_map>

namespace standin {

namespace {

using Clock = std::vector<uint32_t>;
void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) into[i] = std::max(into[i], from[i]);
}

struct Access { const Site* site; int rank; uint32_t time; };
// Accesses to two bytes.
struct Place {
  Access write{nullptr, -1, 0};
  std::vector<Access> reads;  // since the write, the last of each thread
};
struct Phases { Clock open, done; };

struct Read { const unsigned char* at; uint32_t time; };
using Reads = std::vector<Read>;
struct Products { Reads open; std::vector<Reads> groups; };

}  // namespace

// State of a block.
struct Races {
  int threads;
  std::vector<Clock> clocks;  // vector clocks, by thread, then by warp for its products
  std::unordered_map<const void*, Phases> phases;
  std::unordered_map<uintptr_t, Place> places;
  Products products[MAX_WARPS];  // 16-byte operands that products in flight read

  Clock& of_products(int rank) { return clocks[(size_t)(threads + (rank >> 5))]; }
};

namespace {

Races& known() { return *block->races; }
int me() { return block->current->rank; }

[[noreturn]] void report(const Site* before, const char* whose, int number, const Site* site, bool writes) {
  const auto name = [](const Site* s, char* text, size_t size) {
    s ? snprintf(text, size, "%s:%d", s->file, s->line) : snprintf(text, size, "an asynchronous copy or product");
  };
  char first[128], second[128], text[400];
  name(before, first, sizeof first), name(site, second, sizeof second);
  const char* what = writes ? "write" : "read";
  snprintf(text, sizeof text, "a race: %s (%s %d) and this %s, %s, are in no order", first, whose, number, what, second);
  die(text);
}

// Checks the access of `rank` against the state of each pair of bytes.
template <class Each> void each_place(const unsigned char* at, int bytes, Each each) {
  const auto start = reinterpret_cast<uintptr_t>(at) / 2, end = (reinterpret_cast<uintptr_t>(at) + (size_t)bytes + 1) / 2;
  for (uintptr_t i = start; i < end; i++) each(known().places[i]);
}
void check(const Access& before, int rank, const Site* site, bool writes) {
  if (before.rank < 0 || before.time <= known().clocks[(size_t)rank][(size_t)before.rank]) return;
  const bool product = before.rank >= known().threads;
  report(before.site, product ? "warp" : "thread", product ? before.rank - known().threads : before.rank, site, writes);
}
void order_of(int rank, const Site* site, const unsigned char* at, int bytes, bool writes) {
  const Access mine{site, rank, known().clocks[(size_t)rank][(size_t)rank]};
  each_place(at, bytes, [&](Place& place) {
    check(place.write, rank, site, writes);
    if (writes) {
      for (const Access& read : place.reads) check(read, rank, site, true);
      place.write = mine;
      place.reads.clear();
    } else {
      auto same = std::find_if(place.reads.begin(), place.reads.end(), [&](const Access& a) { return a.rank == rank; });
      same == place.reads.end() ? place.reads.push_back(mine) : void(*same = mine);
    }
  });
}

}  // namespace

void begin_races(int threads) {
  if (!block->races) block->races = new Races();
  known() = Races();
  known().threads = threads;
  const size_t all = (size_t)(threads + block->warps);
  known().clocks.assign(all, Clock(all, 0));
  for (size_t i = 0; i < all; i++) known().clocks[i][i] = 1;
}

void order(const Site* site, const unsigned char* at, int bytes, bool writes) { order_of(me(), site, at, bytes, writes); }

void release_to(const void* place) {
  Clock& mine = known().clocks[(size_t)me()];
  join(known().phases[place].open, mine);
  mine[(size_t)me()]++;
}

void end_phase(const void* place) {
  Phases& p = known().phases[place];
  join(p.done, p.open);
  p.open.clear();
}

void acquire_from(const void* place, int rank) { join(known().clocks[(size_t)rank], known().phases[place].done); }

void begin_product() {
  const size_t first = (size_t)(me() & ~31), self = (size_t)(known().threads + (me() >> 5));
  Clock& clock = known().of_products(me());
  for (size_t i = 0; i < clock.size(); i++) {
    if (i == self) {
      clock[i]++;
      continue;
    }
    clock[i] = known().clocks[first][i];
    for (size_t lane = 1; lane < 32; lane++) clock[i] = std::min(clock[i], known().clocks[first + lane][i]);
  }
}
void product_reads(const unsigned char* at) {
  const int self = known().threads + (me() >> 5);
  order_of(self, nullptr, at, 16, false);
  known().products[me() >> 5].open.push_back({at, known().of_products(me())[(size_t)self]});
}
void commit_reads() {
  Products& mine = known().products[me() >> 5];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
void finish_reads(int pending) {
  auto& groups = known().products[me() >> 5].groups;
  const int self = known().threads + (me() >> 5);
  uint32_t done = 0;
  while ((int)groups.size() > pending) {
    for (const Read& read : groups.front()) {
      each_place(read.at, 16, [&](Place& place) { check(place.write, self, nullptr, false); });
      done = std::max(done, read.time);
    }
    groups.erase(groups.begin());
  }
  for (int l = 0; l < 32; l++) {
    uint32_t& knows = known().clocks[(size_t)((me() & ~31) + l)][(size_t)self];
    knows = std::max(knows, done);
  }
}

void lanes_meet(uint32_t lanes) {
  const int first = me() & ~31;
  auto& clocks = known().clocks;
  Clock all;
  for (int l = 0; l < 32; l++) if (lanes >> l & 1) join(all, clocks[(size_t)(first + l)]);
  for (int l = 0; l < 32; l++) {
    if (!(lanes >> l & 1)) continue;
    clocks[(size_t)(first + l)] = all;
    clocks[(size_t)(first + l)][(size_t)(first + l)]++;
  }
}

// ---- between blocks

namespace {

// Sparse vector clocks of blocks: there are many, and each knows of few.
using BlockClock = std::unordered_map<uint32_t, uint32_t>;
void join(BlockClock& into, const BlockClock& from) {
  for (const auto& [index, time] : from) into[index] = std::max(into[index], time);
}
// A block's clock now, at its last fence, and what it has acquired by atomics since.
struct Order { BlockClock now, published, seen; };
// Two bytes of global memory: the block that wrote them, and up to two that have read them.
struct Touch {
  const Site *writer_site = nullptr, *reader_site[2] = {};
  uint32_t writer = 0, writer_time = 0, reader[2] = {}, reader_time[2] = {};  // blocks from 1 on; 0: none
};
constexpr uint64_t PAGE = 2048;
struct Grids {
  std::unordered_map<uint32_t, Order> orders;
  std::unordered_map<const void*, BlockClock> places;
  std::unordered_map<uint64_t, std::vector<Touch>> pages;
};
// A pointer, because thread-local storage of libraries that are loaded late is small.
Grids& grid() {
  static thread_local std::unique_ptr<Grids> mine = std::make_unique<Grids>();
  return *mine;
}
uint32_t my_block() {
  const dim3& size = block->launch->grid;
  return (block->index.z * size.y + block->index.y) * size.x + block->index.x + 1;
}
Order& my_order() {
  Order& order = grid().orders[my_block()];
  if (order.now.empty()) order.now[my_block()] = 1;
  return order;
}

}  // namespace

void begin_grid() { grid() = Grids(); }

void order_between_blocks(const Site* site, uint64_t at, int bytes, bool writes) {
  const uint32_t mine = my_block();
  const BlockClock& now = my_order().now;
  const uint32_t time = now.at(mine);
  const auto check = [&](const Site* before, uint32_t other, uint32_t when) {
    if (!other || other == mine) return;
    const auto known = now.find(other);
    if (known == now.end() || known->second < when) report(before, "block", (int)other - 1, site, writes);
  };
  for (uint64_t i = at / 2; i < (at + (uint64_t)bytes + 1) / 2; i++) {
    auto& page = grid().pages[i / PAGE];
    if (page.empty()) page.resize(PAGE);
    Touch& t = page[i % PAGE];
    check(t.writer_site, t.writer, t.writer_time);
    if (writes) {
      for (int r = 0; r < 2; r++) check(t.reader_site[r], t.reader[r], t.reader_time[r]);
      t.writer_site = site, t.writer = mine, t.writer_time = time;
      continue;
    }
    const int r = t.reader[0] && t.reader[0] != mine;
    t.reader_site[r] = site, t.reader[r] = mine, t.reader_time[r] = time;
  }
}

void fence_between_blocks() {
  Order& order = my_order();
  join(order.now, order.seen);
  order.seen.clear();
  order.published = order.now;
  order.now[my_block()]++;
}

void atomic_between_blocks(const void* place) {
  Order& order = my_order();
  BlockClock& there = grid().places[place];
  join(order.seen, there);
  join(there, order.published);
}

}  // namespace standin
