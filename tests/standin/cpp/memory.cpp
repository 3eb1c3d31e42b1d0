// Device memory. An allocation is filled with NaN and ends at a guard page. On a sparse device memory is mapped when touched, and zero
// before, so that tensors may be larger than the host's memory.
#include <sys/mman.h>
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include "driver.h"

using namespace standin;

namespace {

struct Allocation {
  Device* device;
  size_t bytes, rounded, mapped;
  void* mapping;
};

std::mutex lock;  // of what follows
std::map<uint64_t, Allocation> allocations;
std::set<void*> pinned;

constexpr size_t PAGE = 4096, ALIGNMENT = 256;

int allocate(Device* device, uint64_t* pointer, size_t bytes) {
  if (!device) return INVALID_CONTEXT;
  if (const int error = broken(device)) return error;
  if (bytes == 0) return INVALID_VALUE;
  const size_t rounded = round_up(bytes, ALIGNMENT), mapped = round_up(rounded, PAGE) + PAGE;
  if (device->bytes.fetch_add(rounded) + rounded > device->memory) {
    device->bytes -= rounded;
    return OUT_OF_MEMORY;
  }
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | (device->ends ? MAP_NORESERVE : 0);
  void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapping == MAP_FAILED) {
    device->bytes -= rounded;
    return OUT_OF_MEMORY;
  }
  auto* end = static_cast<unsigned char*>(mapping) + mapped - PAGE;
  mprotect(end, PAGE, PROT_NONE);
  // The host maps zeroed pages: those that nothing writes cost nothing.
  if (device->ends) madvise(mapping, mapped, MADV_NOHUGEPAGE);
  const size_t untouched = device->ends ? bytes : 0;
  memset(end - rounded + untouched, 0xff, rounded - untouched);
  *pointer = reinterpret_cast<uint64_t>(end - rounded);
  device->allocations++;
  std::lock_guard<std::mutex> guard(lock);
  allocations[*pointer] = {device, bytes, rounded, mapped, mapping};
  return SUCCESS;
}

int release_memory(uint64_t pointer) {
  if (const int error = broken(current)) return error;
  if (!pointer) return SUCCESS;
  std::lock_guard<std::mutex> guard(lock);
  const auto found = allocations.find(pointer);
  if (found == allocations.end()) return INVALID_VALUE;
  const Allocation a = found->second;
  for (size_t i = a.bytes; i < a.rounded; i++) {
    if (reinterpret_cast<unsigned char*>(pointer)[i] != 0xff) die("something has written past the end of a device allocation");
  }
  allocations.erase(found);
  munmap(a.mapping, a.mapped);
  a.device->bytes -= a.rounded;
  return SUCCESS;
}

int copy(void* to, const void* from, size_t bytes, Stream* s) {
  return enqueue(s, [=] { memmove(to, from, bytes); });
}
// A copy from or to host memory, which must be pinned to be captured. Of pageable memory, what is copied to the device is read before the
// call returns, and what comes from it is there when it returns.
int copy_host(void* to, const void* from, const void* host, size_t bytes, Stream* s) {
  std::unique_lock<std::mutex> guard(lock);
  const bool known = pinned.count(const_cast<void*>(host));
  guard.unlock();
  if (capturing(s)) {
    if (const int error = known ? SUCCESS : refuse_capture(s)) return error;
  }
  if (known || !defers(s)) return copy(to, from, bytes, s);
  if (host == to) {
    if (const int error = copy(to, from, bytes, s)) return error;
    return drain(s), SUCCESS;
  }
  const auto* first = static_cast<const unsigned char*>(from);
  const auto staged = std::make_shared<std::vector<unsigned char>>(first, first + bytes);
  return enqueue(s, [=] { memcpy(to, staged->data(), bytes); });
}

// Zeroes whole pages of sparse memory by unmapping them.
void clear_sparse(uint64_t to, size_t bytes) {
  const uint64_t end = to + bytes, first = round_up(to, PAGE), last = end / PAGE * PAGE;
  if (first >= last) return (void)memset(reinterpret_cast<void*>(to), 0, bytes);
  memset(reinterpret_cast<void*>(to), 0, first - to);
  madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  memset(reinterpret_cast<void*>(last), 0, end - last);
}

template <class T> int fill(uint64_t to, T value, size_t count, Stream* s) {
  if (count == 0) return SUCCESS;
  if (to % sizeof(T) || !owns(device_of(s), to, count * sizeof(T))) return INVALID_VALUE;
  const bool sparse = device_of(s)->ends && value == 0;
  return enqueue(s, [=] {
    if (sparse) clear_sparse(to, count * sizeof(T));
    else std::fill_n(reinterpret_cast<T*>(to), count, value);
  });
}

}  // namespace

bool standin::owns(Device* device, uint64_t pointer, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  auto next = allocations.upper_bound(pointer);
  if (next == allocations.begin()) return false;
  const auto& [start, a] = *--next;
  return a.device == device && pointer + bytes <= start + a.bytes;
}

API cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
  called(current, __func__);
  return captures_strictly() ? CAPTURE_UNSUPPORTED : allocate(current, pointer, bytes);
}
API cuMemAllocAsync(uint64_t* pointer, size_t bytes, Stream* s) {
  if (const int error = refuse_capture(s)) return error;
  return allocate(device_of(s), pointer, bytes);
}
API cuMemAllocFromPoolAsync(uint64_t* pointer, size_t bytes, void*, Stream* s) { return cuMemAllocAsync(pointer, bytes, s); }
API cuMemFree_v2(uint64_t pointer) {
  called(current, __func__);
  if (captures_strictly()) return CAPTURE_UNSUPPORTED;
  // Waits for the device.
  return drain(current), release_memory(pointer);
}
API cuMemFreeAsync(uint64_t pointer, Stream* s) {
  if (const int error = refuse_capture(s)) return error;
  return drain(s), release_memory(pointer);
}
API cuMemGetInfo_v2(size_t* available, size_t* total) {
  if (!current) return INVALID_CONTEXT;
  if (const int error = broken(current)) return error;
  return *total = current->memory, *available = *total - current->bytes, SUCCESS;
}
API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  if (posix_memalign(pointer, PAGE, std::max<size_t>(bytes, 1))) return OUT_OF_MEMORY;
  std::lock_guard<std::mutex> guard(lock);
  return pinned.insert(*pointer), SUCCESS;
}
API cuMemFreeHost(void* pointer) {
  std::lock_guard<std::mutex> guard(lock);
  return pinned.erase(pointer), free(pointer), SUCCESS;
}
API cuMemPoolSetAttribute(Device*, int, void*) { return SUCCESS; }
API cuMemPoolGetAttribute(Device* pool, int attribute, uint64_t* value) {
  return *value = attribute >= 5 ? pool->bytes.load() : 0, SUCCESS;
}
API cuMemPoolTrimTo(Device*, size_t) { return SUCCESS; }

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* s) {
  called(device_of(s), __func__);
  if (bytes && !owns(device_of(s), to, bytes)) return INVALID_VALUE;
  return copy_host(reinterpret_cast<void*>(to), from, from, bytes, s);
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* s) {
  called(device_of(s), __func__);
  if (bytes && !owns(device_of(s), from, bytes)) return INVALID_VALUE;
  return copy_host(to, reinterpret_cast<void*>(from), to, bytes, s);
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* s) {
  Device* const device = device_of(s);
  called(device, __func__);
  if (bytes && (!owns(device, to, bytes) || !owns(device, from, bytes))) return INVALID_VALUE;
  return enqueue(s, [=] {
    memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    tick(device);
  });
}
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) { return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr); }
API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) { return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr); }
API cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) { return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr); }
API cuMemsetD8Async(uint64_t to, unsigned char value, size_t count, Stream* s) { return called(device_of(s), __func__), fill(to, value, count, s); }
API cuMemsetD16Async(uint64_t to, unsigned short value, size_t count, Stream* s) { return fill(to, value, count, s); }
API cuMemsetD32Async(uint64_t to, unsigned value, size_t count, Stream* s) { return fill(to, value, count, s); }
API cuMemsetD8_v2(uint64_t to, unsigned char value, size_t count) { return fill(to, value, count, nullptr); }
API cuMemsetD16_v2(uint64_t to, unsigned short value, size_t count) { return fill(to, value, count, nullptr); }
API cuMemsetD32_v2(uint64_t to, unsigned value, size_t count) { return fill(to, value, count, nullptr); }
