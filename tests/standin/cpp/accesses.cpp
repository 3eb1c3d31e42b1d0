// Memory accesses of compiled kernels, counted in a GPU's units. A lane's n-th execution of an instruction is coalesced with the n-th
// execution of the other lanes of its warp.
//   global memory: 32-byte sectors that are moved, against those that would hold the requested bytes;
//   shared memory: cycles (one word a bank in each), against those that so many words need at least. Accesses of 8 and 16 bytes a lane
//   are served by halves and quarters of the warp.
#include "accesses.h"
#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <tuple>

namespace standin {

namespace {

bool asked = false;
std::set<std::tuple<const Kernel*, unsigned, unsigned, unsigned, size_t>> watched;

struct Touch { uint64_t address; int bytes; };
struct Warp { std::vector<Touch> lanes[32]; };
struct Totals { uint64_t requests = 0, moved = 0, needed = 0; };

std::mutex lock;
std::map<const Site*, Totals> totals;

void sort_unique(std::vector<uint64_t>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

void count_global(const std::vector<Touch>& request, Totals& sum) {
  std::vector<uint64_t> sectors, words;
  for (const Touch& t : request) {
    for (uint64_t at = t.address / 32; at <= (t.address + t.bytes - 1) / 32; at++) sectors.push_back(at);
    for (int i = 0; i < t.bytes; i += 2) words.push_back((t.address + i) / 2);
  }
  sort_unique(sectors), sort_unique(words);
  sum.moved += sectors.size();
  sum.needed += (words.size() * 2 + 31) / 32;
}

void count_shared(const std::vector<Touch>& request, Totals& sum) {
  const size_t together = request.empty() ? 32 : 128 / std::max(request[0].bytes, 4);
  for (size_t from = 0; from < request.size(); from += together) {
    std::vector<uint64_t> words;
    for (size_t i = from; i < std::min(request.size(), from + together); i++) {
      for (int b = 0; b < request[i].bytes; b += 4) words.push_back((request[i].address + b) / 4);
    }
    sort_unique(words);
    uint64_t banks[32] = {}, most = 0;
    for (uint64_t word : words) most = std::max(most, ++banks[word % 32]);
    sum.moved += most;
    sum.needed += (words.size() + 31) / 32;
  }
}

}  // namespace

// What each warp of a block touched, by instruction.
struct Accesses { std::map<const Site*, std::map<int, Warp>> by_site; };

bool watch(const Launch& launch) {
  if (!asked) return false;
  std::lock_guard<std::mutex> guard(lock);
  return watched.emplace(launch.kernel, launch.grid.x, launch.grid.y, launch.grid.z, launch.shared).second;
}

void touch(const Site& site, uint64_t address, int bytes) {
  const int rank = block->current->rank;
  if (!block->accesses) block->accesses = new Accesses();
  block->accesses->by_site[&site][rank / 32].lanes[rank % 32].push_back({address, bytes});
}

void count_accesses() {
  if (!block->accesses || block->accesses->by_site.empty()) return;
  std::lock_guard<std::mutex> guard(lock);
  for (const auto& [site, warps] : block->accesses->by_site) {
    if (site->joined) continue;
    int joined = 0;
    for (const Site* next = site + 1; next->joined; next++) joined += next->bytes;
    Totals& sum = totals[site];
    for (const auto& [_, warp] : warps) {
      size_t times = 0;
      for (const auto& lane : warp.lanes) times = std::max(times, lane.size());
      for (size_t i = 0; i < times; i++) {
        std::vector<Touch> request;
        for (const auto& lane : warp.lanes) {
          if (i < lane.size()) request.push_back({lane[i].address, lane[i].bytes + joined});
        }
        sum.requests++;
        site->shared ? count_shared(request, sum) : count_global(request, sum);
      }
    }
  }
  block->accesses->by_site.clear();
}

}  // namespace standin

// ---- for tests
// Starts watching accesses.
extern "C" STANDIN_API void standin_watch() { standin::asked = true; }
// Visits every instruction that was seen, with its counts.
extern "C" STANDIN_API void standin_accesses(void* to, void (*visit)(void* to, const standin::Site*, const uint64_t* requests_moved_needed)) {
  std::lock_guard<std::mutex> guard(standin::lock);
  for (const auto& [site, sum] : standin::totals) visit(to, site, &sum.requests);
}
