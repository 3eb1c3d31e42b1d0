// Hopper's asynchronous instructions: mbarriers, TMA, wgmma, setmaxnreg.
#include "hopper.h"
#include <algorithm>
#include <cmath>
#include "cores.h"
#include "races.h"

namespace standin {

namespace {

// An mbarrier as stored in shared memory. Uninitialized shared memory (NaN) is not a valid one.
struct State {
  uint64_t pending : 20, expected : 20, bytes : 22, unused : 1, phase : 1;
};
static_assert(sizeof(State) == 8);
constexpr uint64_t NO_BYTES = 1 << 21, MOST_BYTES = (1 << 20) - 1;

State load(const uint64_t* barrier) {
  shared_address(barrier);
  if (reinterpret_cast<uintptr_t>(barrier) & 7) die("an mbarrier that is not aligned to 8 bytes");
  State state;
  memcpy(&state, barrier, 8);
  if (state.expected == 0xfffff || state.expected == 0) die("an mbarrier that has not been initialised");
  return state;
}

bool awaited(const uint64_t* barrier) {
  const int threads = block->warps * 32 < MAX_THREADS ? block->warps * 32 : MAX_THREADS;
  for (int i = 0; i < threads; i++) {
    if (block->fibers[i].awaits == barrier) return true;
  }
  return false;
}

TensorCopy tensor_copy(const CUtensorMap* map, const void* shared, uint64_t* barrier, std::initializer_list<int> at) {
  if (reinterpret_cast<uintptr_t>(map) & 63) die("a tensor map that is not aligned to 64 bytes");
  if (shared_address(shared) & 127) die("bulk copy: the address in shared memory is not a multiple of 128 bytes");
  TensorCopy c{};
  memcpy(&c.map, map, sizeof c.map);
  if (c.map.rank != at.size()) die("bulk copy: the tensor map has another number of dimensions");
  c.shared = static_cast<unsigned char*>(const_cast<void*>(shared));
  c.barrier = barrier;
  std::copy(at.begin(), at.end(), c.at);
  return c;
}

// f32 additions in memory flush subnormal numbers to zero.
float ftz(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
void add(unsigned char* to, const unsigned char* from) {
  float x, y;
  memcpy(&x, to, 4), memcpy(&y, from, 4);
  x = ftz(ftz(x) + ftz(y));
  memcpy(to, &x, 4);
}

int box_bytes(const TensorMap& map) {
  int bytes = map.element;
  for (int i = 0; i < map.rank; i++) bytes *= map.box[i];
  return bytes;
}

// Outside the tensor, loads give zeros and stores do nothing.
void move(const TensorCopy& c) {
  const TensorMap& m = c.map;
  const int line = m.box[0] * m.element, lines = box_bytes(m) / line;
  shared_address(c.shared + line * lines - 1);
  int index[5] = {};
  for (int i = 0; i < lines; i++) {
    bool inside = true;
    unsigned char* row = m.base;
    for (int d = 1; d < m.rank; d++) {
      const int64_t at = (int64_t)c.at[d] + index[d];
      inside &= at >= 0 && at < (int64_t)m.size[d];
      row += at * (int64_t)m.stride[d - 1];
    }
    for (int piece = 0; piece < line; piece += 16) {
      unsigned char* here = swizzled(c.shared + i * line + piece, m.swizzle);
      const int64_t first = c.at[0] + piece / m.element, past = first + 16 / m.element;
      if (inside && !c.adds && first >= 0 && past <= (int64_t)m.size[0]) {
        unsigned char* there = row + first * m.element;
        c.barrier ? memcpy(here, there, 16) : memcpy(there, here, 16);
        continue;
      }
      for (int64_t x = first; x < past; x++, here += m.element) {
        const bool exists = inside && x >= 0 && x < (int64_t)m.size[0];
        if (c.adds && exists) add(row + x * m.element, here);
        else if (c.barrier && !exists) memset(here, 0, m.element);
        else if (exists) c.barrier ? memcpy(here, row + x * m.element, m.element) : memcpy(row + x * m.element, here, m.element);
      }
    }
    for (int d = 1; d < m.rank && ++index[d] == m.box[d]; d++) index[d] = 0;
  }
  if (c.barrier) mbarrier_add(c.barrier, 0, -(int64_t)box_bytes(m));
}

// The running warp executes this step; the other warps of its warpgroup must execute the same one at this point.
void do_alike(Step step) {
  const int warp = block->current->rank >> 5;
  Warpgroup& group = block->hopper->warpgroups[warp >> 2];
  if (block->warps < (warp | 3) + 1) die("an instruction of the whole warpgroup, of which there are not four warps");
  const size_t at = group.done[warp & 3]++ - group.first;
  if (at == group.steps.size()) {
    group.steps.push_back(step);
  } else {
    const Step& other = group.steps[at];
    if (other.what != step.what || other.a != step.a || other.b != step.b) die("the warps of a warpgroup do different things");
  }
  while (!group.steps.empty() && *std::min_element(group.done, group.done + 4) > group.first) group.steps.pop_front(), group.first++;
}

WarpProducts& my_products() { return block->hopper->products[block->current->rank >> 5]; }

void complete(const Product& product) {
  for (int l = 0; l < 32 && product.fragments[l]; l++) {
    const bool same = memcmp(product.fragments[l], product.registers[l], sizeof product.registers[l]) == 0;
    if (!same) die("registers of an operand were written while wgmma read them");
  }
  auto& accumulators = my_products().accumulators;
  if (--product.to->products) return;
  product.to->give();
  accumulators.remove_if([&](const Accumulator& a) { return &a == product.to; });
}

}  // namespace

void Hopper::start() {
  loads.clear();
  reading.clear();
  for (auto& mine : written) mine.clear();
  unfenced.clear();
  barriers_fenced = true;
  for (Warpgroup& group : warpgroups) {
    group.steps.clear();
    group.first = 0;
    std::fill_n(group.done, 4, 0);
  }
  // Registers of a thread at the start of a kernel with setmaxnreg: an equal share, a multiple of eight.
  free_registers = 0;
  for (int w = 0; w < block->warps; w++) {
    registers[w] = std::min(65536 / (32 * block->warps), 256) / 8 * 8;
    products[w].fenced = false;
    products[w].open.clear();
    products[w].groups.clear();
    products[w].accumulators.clear();
  }
}

void Hopper::finish() {
  if (!loads.empty()) die("the block ends while bulk copies into its shared memory are under way");
  for (int i = 0; i < block->warps * 32 && i < MAX_THREADS; i++) {
    if (!stores[i].empty()) die("the block ends while bulk copies out of its shared memory have not been waited for");
  }
  for (const Warpgroup& group : warpgroups) {
    if (!group.steps.empty()) die("the block ends, and not all warps of a warpgroup have done what one has");
  }
  for (int w = 0; w < block->warps; w++) {
    if (!products[w].accumulators.empty()) die("the block ends while wgmma is under way");
  }
}

// ---- mbarrier
void mbarrier_start(uint64_t* barrier, uint32_t arrivals) {
  shared_address(barrier);
  if (arrivals == 0 || arrivals >= 0xfffff) die("mbarrier_init: arrivals outside 1 to 2^20 - 2");
  const State state{arrivals, arrivals, NO_BYTES, 0, 0};
  memcpy(barrier, &state, 8);
  block->hopper->barriers_fenced = false;
}

// Counts arrivals, and bytes that are expected (positive) or have arrived (negative). The phase ends when both are zero.
void mbarrier_add(uint64_t* barrier, int arrivals, int64_t bytes) {
  State state = load(barrier);
  if (block->watching && arrivals) release_to(barrier);
  if (bytes > (int64_t)MOST_BYTES) die("mbarrier_expect: 2^20 bytes or more");
  if ((int64_t)state.pending < arrivals) die("more arrivals at an mbarrier than it was initialised for");
  state.pending -= (uint64_t)arrivals;
  state.bytes += (uint64_t)bytes;
  const bool ends = state.pending == 0 && state.bytes == NO_BYTES;
  if (ends) {
    state.phase ^= 1;
    state.pending = state.expected;
  }
  memcpy(barrier, &state, 8);
  if (!ends) return;
  if (block->watching) end_phase(barrier);
  for (int i = 0; i < block->warps * 32 && i < MAX_THREADS; i++) {
    Fiber& fiber = block->fibers[i];
    if (fiber.awaits != barrier) continue;
    fiber.awaits = nullptr;
    make_ready(&fiber);
  }
}

void mbarrier_sleep(uint64_t* barrier, uint32_t parity) {
  if (parity > 1) die("mbarrier_wait: a parity other than 0 and 1");
  while (load(barrier).phase == parity) {
    block->current->awaits = barrier;
    park();
  }
  if (block->watching) acquire_from(barrier, block->current->rank);
}

// ---- the async proxy: writes by threads against reads by bulk copies and products
static std::pair<uintptr_t, uintptr_t> pieces(const void* at, int bytes) {
  const auto start = reinterpret_cast<uintptr_t>(at);
  return {start / 8, (start + (uintptr_t)bytes + 7) / 8};
}

// Dies if a bulk store has still to read what is written.
static void assert_not_read(const void* at, int bytes) {
  const auto* start = static_cast<const unsigned char*>(at);
  for (const auto& r : block->hopper->reading) {
    if (start < r.end && r.start < start + bytes) die("shared memory is overwritten that a bulk copy has still to read");
  }
}

void write_unfenced(const void* at, int bytes) {
  assert_not_read(at, bytes);
  for (auto [piece, end] = pieces(at, bytes); piece < end; piece++) {
    block->hopper->written[block->current->rank].push_back(piece);
    block->hopper->unfenced[piece]++;
  }
}

void fence_writes() {
  auto& unfenced = block->hopper->unfenced;
  auto& mine = block->hopper->written[block->current->rank];
  for (uintptr_t piece : mine) {
    if (--unfenced[piece] == 0) unfenced.erase(piece);
  }
  mine.clear();
}

void read_fenced(const void* at, int bytes) {
  const auto& unfenced = block->hopper->unfenced;
  if (unfenced.empty()) return;
  for (auto [piece, end] = pieces(at, bytes); piece < end; piece++) {
    if (unfenced.count(piece)) die("a bulk copy or a product reads what a thread has written since its last fence.proxy.async");
  }
}

// ---- bulk tensor copies
void tensor_load(void* to, const CUtensorMap* map, uint64_t* barrier, std::initializer_list<int> at) {
  if (!block->hopper->barriers_fenced) die("a bulk copy before mbarrier_fence_init");
  load(barrier);
  const TensorCopy copy = tensor_copy(map, to, barrier, at);
  assert_not_read(copy.shared, box_bytes(copy.map));
  if (block->watching) {
    order(nullptr, copy.shared, box_bytes(copy.map), true);
    release_to(barrier);
  }
  if (block->launch->habits.late) block->hopper->loads.push_back(copy);
  else move(copy);
}

bool finish_awaited_copy() {
  auto& loads = block->hopper->loads;
  for (size_t i = 0; i < loads.size(); i++) {
    if (!awaited(loads[i].barrier)) continue;
    const TensorCopy copy = loads[i];
    loads.erase(loads.begin() + (ptrdiff_t)i);
    move(copy);
    return true;
  }
  return false;
}

void tensor_store(const CUtensorMap* map, const void* from, std::initializer_list<int> at, bool adds) {
  TensorCopy copy = tensor_copy(map, from, nullptr, at);
  copy.adds = adds;
  if (adds && !copy.map.f32) die("a bulk copy that adds: f32 is known here");
  read_fenced(copy.shared, box_bytes(copy.map));
  if (block->watching) order(nullptr, copy.shared, box_bytes(copy.map), false);
  if (!block->launch->habits.late) move(copy);
  block->hopper->stores[block->current->rank].push_back(copy);
  block->hopper->reading.push_back({copy.shared, copy.shared + box_bytes(copy.map), block->current->rank});
}

void store_commit() {
  const int me = block->current->rank;
  block->hopper->store_groups[me].push_back((int)block->hopper->stores[me].size());
}

void store_wait(int pending) {
  auto& stores = block->hopper->stores[block->current->rank];
  auto& groups = block->hopper->store_groups[block->current->rank];
  const int done = (int)groups.size() - pending;
  if (done <= 0) return;
  const int end = groups[(size_t)done - 1];
  for (int i = 0; i < end; i++) {
    const TensorCopy& copy = stores[(size_t)i];
    if (block->watching) order(nullptr, copy.shared, box_bytes(copy.map), false);
    if (block->launch->habits.late) move(copy);
    auto& reading = block->hopper->reading;
    reading.erase(std::find_if(reading.begin(), reading.end(), [](const auto& r) { return r.rank == block->current->rank; }));
  }
  stores.erase(stores.begin(), stores.begin() + end);
  groups.erase(groups.begin(), groups.begin() + done);
  for (int& group : groups) group -= end;
}

// ---- registers
// setmaxnreg of a warpgroup. A warp that asks for more than are free waits for others to release some.
void registers_change(int to, bool increase) {
  if (to % 8 || to < 24 || to > 256) die("setmaxnreg: a multiple of 8 from 24 to 256");
  meet_all(increase ? 51 : 52, nullptr, [&](void**) {
    Hopper& hopper = *block->hopper;
    int& mine = hopper.registers[block->current->rank >> 5];
    do_alike({increase ? 1 : 2, (uint64_t)to, 0});
    if (increase ? to < mine : to > mine) die("setmaxnreg: an increase to less, or a decrease to more than there are");
    while (to - mine > hopper.free_registers) {
      block->current->awaits = &hopper.free_registers;
      park();
    }
    hopper.free_registers -= to - mine;
    mine = to;
    for (int i = 0; !increase && i < block->warps * 32; i++) {
      Fiber& fiber = block->fibers[i];
      if (fiber.awaits != &hopper.free_registers) continue;
      fiber.awaits = nullptr;
      make_ready(&fiber);
    }
  });
}

// ---- warpgroup products
// Lane l holds of column group j (8 wide) the pairs at row l / 4, columns 2·(l mod 4), and 8 rows below.
void Accumulator::take() {
  for (int l = 0; l < 32; l++) {
    for (int j = 0; j < columns / 8; j++) {
      for (int below = 0; below < 2; below++) {
        memcpy(&sums[l / 4 + 8 * below][8 * j + 2 * (l & 3)], registers[l] + 4 * j + 2 * below, 8);
      }
    }
    for (int i = 0; i < columns / 2; i++) registers[l][i] = NAN;
  }
}

void Accumulator::give() const {
  for (int l = 0; l < 32; l++) {
    for (int j = 0; j < columns / 8; j++) {
      for (int below = 0; below < 2; below++) {
        memcpy(registers[l] + 4 * j + 2 * below, &sums[l / 4 + 8 * below][8 * j + 2 * (l & 3)], 8);
      }
    }
  }
}

// A descriptor: start, leading and stride offsets in 16 bytes, swizzle. Canonical layouts in pieces T of 8 bf16 (16 bytes):
//   k contiguous:  swizzled ((8, m), (T, 2)) : ((span, stride), (1, T));   none ((8, m), (T, 2)) : ((T, stride), (1, leading))
//   m contiguous:  swizzled ((T, span / T, m), (8, k)) : ((1, T, leading), (span, stride));
//                  none     ((T, 1, m), (8, k)) : ((1, T, stride), (T, leading))
// Eight bf16 as floats: for a contiguous k, k = 8·chunk … of row `line`; else rows 8·chunk … at k = `line`.
void operand_chunk(float* out, uint64_t descriptor, bool transposed, int line, int chunk) {
  const auto field = [&](int bit) { return (size_t)(descriptor >> bit & 0x3fff) << 4; };
  const size_t start = field(0), leading = field(16), stride = field(32);
  if (descriptor >> 49 & 7) die("wgmma descriptor: a base offset (operands begin at whole repetitions of the swizzle here)");
  const int swizzle = (4 - (int)(descriptor >> 62)) & 3;  // 1: 128 bytes, 2: 64, 3: 32
  const size_t eight = (size_t)line >> 3, within = (size_t)line & 7, span = swizzle ? (size_t)16 << swizzle : 16;
  const size_t pieces = span / 16, c = (size_t)chunk;
  size_t offset = within * span + eight * stride;
  if (!transposed) offset += swizzle ? c * 16 : c * leading;
  else if (swizzle) offset += c % pieces * 16 + c / pieces * leading;
  else offset = within * 16 + eight * leading + c * stride;
  unsigned char* piece = shared_place(start + offset, 16);
  if (!piece) die("wgmma: an operand reaches outside shared memory");
  piece = swizzled(piece, swizzle);
  read_fenced(piece, 16);
  if (block->watching) product_reads(piece);
  uint16_t bits[8];
  memcpy(bits, piece, 16);
  for (int i = 0; i < 8; i++) out[i] = __uint_as_float((uint32_t)bits[i] << 16);
}

void multiply(const Product& p) {
  alignas(32) float a[16][16], b[16][MAX_COLUMNS];
  const int row = p.to->first_row;
  float x[8];
  for (int i = 0; i < 16; i++) {
    for (int half = 0; half < 2; half++) {
      if (p.in_registers) {
        for (int e = 0; e < 8; e++) {
          const uint32_t pair = p.registers[4 * (i & 7) + e / 2][2 * half + i / 8];
          a[i][8 * half + e] = e & 1 ? high_half(pair) : low_half(pair);
        }
      } else if (p.trans_a) {
        operand_chunk(x, p.a, true, i, row / 8 + half);
        for (int e = 0; e < 8; e++) a[8 * half + e][i] = x[e];
      } else {
        operand_chunk(&a[i][8 * half], p.a, false, row + i, half);
      }
    }
  }
  for (int k = 0; p.trans_b && k < 16; k++) {
    for (int n = 0; n < p.columns; n += 8) operand_chunk(&b[k][n], p.b, true, k, n / 8);
  }
  for (int n = 0; !p.trans_b && n < p.columns; n++) {
    for (int half = 0; half < 2; half++) {
      operand_chunk(x, p.b, false, n, half);
      for (int e = 0; e < 8; e++) b[8 * half + e][n] = x[e];
    }
  }
  for (int i = 0; !p.accumulate && i < 16; i++) std::fill_n(p.to->sums[i], p.columns, 0.f);
  add_products(p.to->sums[0], a[0], b[0], p.columns, MAX_COLUMNS);
}

void product_issue(float* const* d, Product product) {
  WarpProducts& mine = my_products();
  const int kind = product.trans_a | product.trans_b << 1 | product.in_registers << 2 | product.accumulate << 3;
  do_alike({product.columns << 4 | kind, product.a, product.b});
  if (block->watching) begin_product();
  for (Accumulator& a : mine.accumulators) {
    if (a.registers[0] == d[0]) product.to = &a;
  }
  if (!product.to) {
    if (!mine.fenced) die("wgmma on registers that were free to use, without wgmma_fence before it");
    product.to = &mine.accumulators.emplace_back();
    std::copy(d, d + 32, product.to->registers);
    product.to->columns = product.columns;
    product.to->products = 0;
    product.to->first_row = (block->current->rank >> 5 & 3) * 16;
    product.to->take();
  }
  if (product.to->columns != product.columns) die("wgmma of different shapes on the same registers at a time");
  product.to->products++;
  if (!block->launch->habits.late) multiply(product);
  mine.open.push_back(product);
}

void product_commit() {
  WarpProducts& mine = my_products();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void product_wait(int pending) {
  WarpProducts& mine = my_products();
  while ((int)mine.groups.size() > pending) {
    for (const Product& product : mine.groups.front()) {
      if (block->launch->habits.late) multiply(product);
      complete(product);
    }
    mine.groups.erase(mine.groups.begin());
  }
  mine.fenced = false;
}

}  // namespace standin

// ---- tensor maps
extern "C" STANDIN_API int cuTensorMapEncodeTiled(CUtensorMap* map, int type, unsigned rank, void* base, const uint64_t* size, const uint64_t* stride,
                           const uint32_t* box, const uint32_t* element_stride, int interleave, int swizzle, int promotion, int fill) {
  constexpr int INVALID = 1, UNSUPPORTED = 801;  // CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_SUPPORTED
  static const uint8_t bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  const auto multiple = [](const void* p, uintptr_t of) { return reinterpret_cast<uintptr_t>(p) % of == 0; };
  if (!map || !multiple(map, 64) || !base || !multiple(base, 16) || type < 0 || type > 12 || rank < 1 || rank > 5) return INVALID;
  if (swizzle < 0 || swizzle > 3 || promotion < 0 || promotion > 3) return INVALID;
  if (interleave || fill) return UNSUPPORTED;
  standin::TensorMap m{};
  m.base = static_cast<unsigned char*>(base);
  m.rank = (uint8_t)rank, m.element = bytes[type], m.swizzle = (uint8_t)swizzle;
  m.f32 = type == 7;  // CU_TENSOR_MAP_DATA_TYPE_FLOAT32
  for (unsigned i = 0; i < rank; i++) {
    if (!size[i] || size[i] > 1ull << 32 || !box[i] || box[i] > 256 || element_stride[i] != 1) return INVALID;
    if (i && (stride[i - 1] % 16 || stride[i - 1] >= 1ull << 40)) return INVALID;
    m.size[i] = size[i], m.box[i] = (uint16_t)box[i];
    if (i) m.stride[i - 1] = stride[i - 1];
  }
  const unsigned line = box[0] * m.element;
  if (line % 16 || (swizzle && line > 16u << swizzle)) return INVALID;
  // The manual does not say how lines lie that are narrower than the swizzle.
  if (swizzle && line < 16u << swizzle) return UNSUPPORTED;
  memset(map, 0, sizeof *map);
  return memcpy(map, &m, sizeof m), 0;
}
