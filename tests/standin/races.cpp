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
// Of two bytes.
struct Place {
  Access write{nullptr, -1, 0};
  std::vector<Access> reads;  // since then, the last of each thread
};
struct Phases { Clock open, done; };

using Reads = std::vector<const unsigned char*>;
struct Products { Reads open; std::vector<Reads> groups; };

// What is known of the block that runs on this CPU thread. By a pointer: a library that is loaded later has few bytes of a thread.
struct Known {
  std::vector<Clock> clocks;  // by thread: what of each thread comes before what it does now
  std::unordered_map<const void*, Phases> phases;
  std::unordered_map<uintptr_t, Place> places;
  Products products[MAX_WARPS];  // what products under way read, 16 bytes each
};
Known& known() {
  static thread_local std::unique_ptr<Known> mine = std::make_unique<Known>();
  return *mine;
}

int me() { return block->current->rank; }

void report(const Access& before, const Site* site, bool writes) {
  const auto name = [](const Site* s, char* text, size_t size) {
    s ? snprintf(text, size, "%s:%d", s->file, s->line) : snprintf(text, size, "an asynchronous copy or product");
  };
  char first[128], second[128], text[400];
  name(before.site, first, sizeof first), name(site, second, sizeof second);
  snprintf(text, sizeof text, "a race: %s (thread %d) and this %s, %s, are in no order", first, before.rank, writes ? "write" : "read", second);
  die(text);
}

}  // namespace

void begin_races(int threads) {
  known() = Known();
  known().clocks.assign((size_t)threads, Clock((size_t)threads, 0));
  for (int i = 0; i < threads; i++) known().clocks[(size_t)i][(size_t)i] = 1;
}

void order(const Site* site, const unsigned char* at, int bytes, bool writes) {
  const int rank = me();
  auto& places = known().places;
  const Clock& now = known().clocks[(size_t)rank];
  const auto after = [&](const Access& a) { return a.rank < 0 || a.time <= now[(size_t)a.rank]; };
  const auto start = reinterpret_cast<uintptr_t>(at) / 2, end = (reinterpret_cast<uintptr_t>(at) + (size_t)bytes + 1) / 2;
  const Access mine{site, rank, now[(size_t)rank]};
  for (uintptr_t i = start; i < end; i++) {
    Place& place = places[i];
    if (!after(place.write)) report(place.write, site, writes);
    if (writes) {
      for (const Access& read : place.reads) {
        if (!after(read)) report(read, site, true);
      }
      place.write = mine;
      place.reads.clear();
    } else {
      auto same = std::find_if(place.reads.begin(), place.reads.end(), [&](const Access& a) { return a.rank == rank; });
      same == place.reads.end() ? place.reads.push_back(mine) : void(*same = mine);
    }
  }
}

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

void product_reads(const unsigned char* at) {
  order(nullptr, at, 16, false);
  known().products[me() >> 5].open.push_back(at);
}
void commit_reads() {
  Products& mine = known().products[me() >> 5];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
void finish_reads(int pending) {
  auto& groups = known().products[me() >> 5].groups;
  while ((int)groups.size() > pending) {
    for (const unsigned char* at : groups.front()) order(nullptr, at, 16, false);
    groups.erase(groups.begin());
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

}  // namespace standin
