// libcuda's stand-in: the driver calls that cudarc makes, carried out at once, over several devices that behave differently.
// Device memory is NaN when allocated and ends before a page that cannot be touched. A call that CUDA refuses is refused
// with the same error.
#include <dlfcn.h>
#include <sys/mman.h>
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include "driver.h"
#include "hopper.h"

using namespace standin;

namespace {

const std::map<int, std::pair<const char*, const char*>> ERRORS = {
    {SUCCESS, {"CUDA_SUCCESS", "no error"}},
    {INVALID_VALUE, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {OUT_OF_MEMORY, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {NOT_INITIALIZED, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {NO_DEVICE, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {INVALID_DEVICE, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {INVALID_IMAGE, {"CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"}},
    {INVALID_CONTEXT, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {NO_BINARY_FOR_GPU, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {INVALID_HANDLE, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {NOT_FOUND, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {LAUNCH_OUT_OF_RESOURCES, {"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"}},
    {NOT_SUPPORTED, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
    {CAPTURE_UNSUPPORTED, {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"}},
    {CAPTURE_INVALIDATED, {"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"}},
    {CAPTURE_UNMATCHED, {"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "the capture was not initiated in this stream"}},
};

constexpr size_t GIB = 1ull << 30;
constexpr bool LATE = true, EARLY = false, DOWN = true, UP = false, NOISY = true, EXACT = false;
Device devices[] = {
    {"stand-in GPU 9.0, late", 9, {LATE, UP, EXACT}, 64 * GIB, true},
    {"stand-in GPU 9.0, early", 9, {EARLY, DOWN, NOISY}, 64 * GIB, true},
    {"stand-in GPU 8.0, late", 8, {LATE, DOWN, NOISY}, 64 * GIB, true},
    {"stand-in GPU 8.0, early", 8, {EARLY, UP, EXACT}, 64 * GIB, true},
    {"stand-in GPU 7.0, too old", 7, {LATE, UP, EXACT}, 64 * GIB, true},
    {"stand-in GPU 9.0, 1 MiB of memory", 9, {LATE, UP, EXACT}, 1 << 20, true},
    {"stand-in GPU 9.0, loads no image", 9, {LATE, UP, EXACT}, 64 * GIB, false},
};
constexpr int DEVICES = sizeof devices / sizeof devices[0];

struct Event {
  bool timed;
  double milliseconds = -1;  // −1: not recorded
};
struct Image {
  std::string stem;
  std::vector<unsigned char> bytes;
};
struct Allocation {
  Device* device;
  size_t bytes, rounded, mapped;
  void* mapping;
};

std::mutex lock;  // of what follows
std::map<uint64_t, Allocation> allocations;
std::vector<Image> images;
std::set<void*> pinned;
std::atomic<bool> initialised{false};

// What may not be captured ends the capture.
int refuse_capture(Stream* s) {
  if (!capturing(s)) return SUCCESS;
  s->capture->invalid = true;
  return CAPTURE_UNSUPPORTED;
}

double now(const Device* device) {
  if (device->each_ns) return (double)device->clock_ns / 1e6;
  using namespace std::chrono;
  return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

constexpr size_t PAGE = 4096, ALIGNMENT = 256;
size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

int allocate(Device* device, uint64_t* pointer, size_t bytes) {
  if (!device) return INVALID_CONTEXT;
  if (bytes == 0) return INVALID_VALUE;
  const size_t rounded = round_up(bytes, ALIGNMENT), mapped = round_up(rounded, PAGE) + PAGE;
  if (device->bytes.fetch_add(rounded) + rounded > device->memory) {
    device->bytes -= rounded;
    return OUT_OF_MEMORY;
  }
  void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) {
    device->bytes -= rounded;
    return OUT_OF_MEMORY;
  }
  auto* end = static_cast<unsigned char*>(mapping) + mapped - PAGE;
  mprotect(end, PAGE, PROT_NONE);
  memset(end - rounded, 0xff, rounded);
  *pointer = reinterpret_cast<uint64_t>(end - rounded);
  device->allocations++;
  std::lock_guard<std::mutex> guard(lock);
  allocations[*pointer] = {device, bytes, rounded, mapped, mapping};
  return SUCCESS;
}

int release_memory(uint64_t pointer) {
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
// A copy that the host takes part in; its memory must be pinned to be captured.
int copy_host(void* to, const void* from, const void* host, size_t bytes, Stream* s) {
  if (capturing(s)) {
    std::unique_lock<std::mutex> guard(lock);
    const bool known = pinned.count(const_cast<void*>(host));
    guard.unlock();
    if (const int error = known ? SUCCESS : refuse_capture(s)) return error;
  }
  return copy(to, from, bytes, s);
}

template <class T> int fill(uint64_t to, T value, size_t count, Stream* s) {
  if (count == 0) return SUCCESS;
  if (to % sizeof(T) || !owns(device_of(s), to, count * sizeof(T))) return INVALID_VALUE;
  return enqueue(s, [=] { std::fill_n(reinterpret_cast<T*>(to), count, value); });
}

bool is_hopper(const std::string& stem) { return stem.size() > 5 && stem.compare(stem.size() - 5, 5, "_sm90") == 0; }

std::string stem_of(const Kernel& kernel) {
  std::string file = kernel.file;
  file = file.substr(file.rfind('/') + 1);
  return file.substr(0, file.rfind('.'));
}

const Kernel* find_kernel(const std::string& name, const std::string& stem) {
  for (const Kernel* k : kernels()) {
    if (k->name == name && (stem.empty() || stem_of(*k) == stem)) return k;
  }
  return nullptr;
}

}  // namespace

// ---- a process of its own is told by the environment what it finds: the driver's version, which device is the first, how many
// there are; and a file with a line a kernel file: its stem, its library, its image
namespace {
int setting(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}
int first() { return std::clamp(setting("STANDIN_FIRST", 0), 0, DEVICES - 1); }
int shown() { return std::clamp(setting("STANDIN_DEVICES", DEVICES), 0, DEVICES - first()); }

void load_kernels(const char* list) {
  // The kernels' libraries use this one's names.
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&setting), &self);
  dlopen(self.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
  std::ifstream lines(list);
  for (std::string stem, library, image; lines >> stem >> library >> image;) {
    if (!dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) die(dlerror());
    std::ifstream file(image, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    images.push_back({stem, {bytes.begin(), bytes.end()}});
  }
}
}  // namespace

// ---- shared
namespace standin {
thread_local Device* current = nullptr;

int enqueue(Stream* s, Operation operation) {
  if (!device_of(s)) return INVALID_CONTEXT;
  if (!capturing(s)) operation();
  else if (s->capture->invalid) return CAPTURE_INVALIDATED;
  else s->capture->append(std::move(operation));
  return SUCCESS;
}

bool owns(Device* device, uint64_t pointer, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  auto next = allocations.upper_bound(pointer);
  if (next == allocations.begin()) return false;
  const auto& [start, a] = *--next;
  return a.device == device && pointer + bytes <= start + a.bytes;
}

void tick(Device* device) { device->clock_ns += device->each_ns; }

void called(Device* device, const char* name) {
  if (!device) return;
  std::lock_guard<std::mutex> guard(device->lock);
  device->calls[name]++;
}
}  // namespace standin

// ---- for tests
extern "C" STANDIN_API uint64_t standin_calls(int device, const char* name) {
  std::lock_guard<std::mutex> guard(devices[device].lock);
  return devices[device].calls[name];
}
extern "C" STANDIN_API uint64_t standin_launches(int device) { return devices[device].launches; }
extern "C" STANDIN_API uint64_t standin_allocations(int device) { return devices[device].allocations; }
extern "C" STANDIN_API uint64_t standin_bytes(int device) { return devices[device].bytes; }
// From now on each kernel and each copy within the device takes so long by its events.
extern "C" STANDIN_API void standin_each_takes(int device, uint64_t ns) { devices[device].each_ns = ns; }
extern "C" STANDIN_API uint64_t standin_profiled(int device) { return devices[device].profiled; }
// Names the kernel file that an image is made of. A module of an image finds the kernels of that file alone.
extern "C" STANDIN_API void standin_image(const char* stem, const unsigned char* bytes, size_t length) {
  std::lock_guard<std::mutex> guard(lock);
  images.push_back({stem, {bytes, bytes + length}});
}
// Calls with each registered kernel: its name, its file's stem, and offset and size of each parameter.
extern "C" STANDIN_API void standin_kernels(void* to, void (*visit)(void* to, const char* name, const char* stem, const Parameter*, int)) {
  for (const Kernel* k : kernels()) visit(to, k->name, stem_of(*k).c_str(), k->layout, k->parameters);
}

// ---- errors, devices, contexts
API cuInit(unsigned) {
  if (shown() == 0) return NO_DEVICE;
  if (initialised.exchange(true)) return SUCCESS;
  if (const char* list = getenv("STANDIN_KERNELS")) load_kernels(list);
  return watch_for_faults(), SUCCESS;
}
API cuDriverGetVersion(int* version) { return *version = setting("STANDIN_VERSION", 13000), SUCCESS; }
API cuGetErrorName(int error, const char** text) {
  const auto found = ERRORS.find(error);
  return *text = found == ERRORS.end() ? nullptr : found->second.first, *text ? SUCCESS : INVALID_VALUE;
}
API cuGetErrorString(int error, const char** text) {
  const auto found = ERRORS.find(error);
  return *text = found == ERRORS.end() ? nullptr : found->second.second, *text ? SUCCESS : INVALID_VALUE;
}
API cuDeviceGetCount(int* count) {
  if (!initialised) return NOT_INITIALIZED;
  return *count = shown(), SUCCESS;
}
API cuDeviceGet(int* device, int ordinal) {
  if (!initialised) return NOT_INITIALIZED;
  if (ordinal < 0 || ordinal >= shown()) return INVALID_DEVICE;
  return *device = first() + ordinal, SUCCESS;
}
API cuDeviceGetName(char* name, int length, int device) { return snprintf(name, (size_t)length, "%s", devices[device].name), SUCCESS; }
API cuDeviceTotalMem_v2(size_t* bytes, int device) { return *bytes = devices[device].memory, SUCCESS; }
API cuDeviceGetUuid_v2(unsigned char* uuid, int device) {
  memset(uuid, 0, 16);
  return uuid[15] = (unsigned char)device, SUCCESS;
}
API cuDeviceGetUuid(unsigned char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
API cuDeviceGetAttribute(int* value, int attribute, int ordinal) {
  if (ordinal < 0 || ordinal >= DEVICES) return INVALID_DEVICE;
  const Device& d = devices[ordinal];
  const std::map<int, int> values = {
      {1, 1024}, {2, 1024}, {3, 1024}, {4, 64},              // threads a block, and along x, y, z
      {5, 2147483647}, {6, 65535}, {7, 65535},               // blocks along x, y, z
      {8, 49152}, {97, d.shared_optin()}, {81, d.shared_per_processor()}, {111, 1024},
      {10, 32}, {12, 65536}, {82, 65536}, {16, d.processors()}, {39, 2048}, {106, 32},
      {13, 1755000}, {36, 2619000}, {37, 5120}, {38, 50 << 20},  // clocks in kHz, bus width, L2
      {33, 1 + ordinal}, {41, 1}, {75, d.major}, {76, 0}, {83, 0}, {95, 1}, {115, 1},
  };
  const auto found = values.find(attribute);
  return *value = found == values.end() ? 0 : found->second, SUCCESS;
}
API cuDevicePrimaryCtxRetain(Device** context, int device) {
  if (!initialised) return NOT_INITIALIZED;
  if (device < 0 || device >= DEVICES) return INVALID_DEVICE;
  return *context = &devices[device], SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxGetCurrent(Device** context) { return *context = current, SUCCESS; }
API cuCtxSetCurrent(Device* context) { return current = context, SUCCESS; }
API cuCtxGetDevice(int* device) {
  if (!current) return INVALID_CONTEXT;
  return *device = (int)(current - devices), SUCCESS;
}
API cuCtxSynchronize() { return called(current, __func__), current ? SUCCESS : INVALID_CONTEXT; }
API cuCtxSetFlags(unsigned) { return SUCCESS; }
API cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, SUCCESS; }

// ---- streams and events
API cuStreamCreate(Stream** stream, unsigned) {
  if (!current) return INVALID_CONTEXT;
  return *stream = new Stream{current, nullptr}, SUCCESS;
}
API cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
API cuStreamDestroy_v2(Stream* s) {
  if (is_default(s)) return INVALID_HANDLE;
  return delete s, SUCCESS;
}
API cuStreamSynchronize(Stream* s) { return called(device_of(s), __func__), device_of(s) ? refuse_capture(s) : INVALID_CONTEXT; }
API cuStreamQuery(Stream* s) { return refuse_capture(s); }
API cuStreamWaitEvent(Stream*, Event*, unsigned) { return SUCCESS; }
API cuLaunchHostFunc(Stream* s, void (*function)(void*), void* data) {
  return enqueue(s, [=] { function(data); });
}
API cuEventCreate(Event** event, unsigned flags) {
  if (!current) return INVALID_CONTEXT;
  return *event = new Event{!(flags & 2)}, SUCCESS;
}
API cuEventDestroy_v2(Event* event) { return delete event, SUCCESS; }
API cuEventRecord(Event* event, Stream* s) {
  Device* const device = device_of(s);
  return enqueue(s, [=] { event->milliseconds = now(device); });
}
API cuEventSynchronize(Event*) { return called(current, __func__), SUCCESS; }
API cuEventQuery(Event*) { return SUCCESS; }
API cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
  if (!start->timed || !end->timed || start->milliseconds < 0 || end->milliseconds < 0) return INVALID_HANDLE;
  return *milliseconds = (float)(end->milliseconds - start->milliseconds), SUCCESS;
}
API cuEventElapsedTime(float* milliseconds, Event* start, Event* end) { return cuEventElapsedTime_v2(milliseconds, start, end); }

// ---- memory
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
  return captures_strictly() ? CAPTURE_UNSUPPORTED : release_memory(pointer);
}
API cuMemFreeAsync(uint64_t pointer, Stream* s) {
  if (const int error = refuse_capture(s)) return error;
  return release_memory(pointer);
}
API cuMemGetInfo_v2(size_t* available, size_t* total) {
  if (!current) return INVALID_CONTEXT;
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
API cuDeviceGetDefaultMemPool(Device** pool, int device) { return *pool = &devices[device], SUCCESS; }
API cuDeviceGetMemPool(Device** pool, int device) { return *pool = &devices[device], SUCCESS; }
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

// ---- modules and functions
API cuModuleLoadData(Module** module, const void* image) {
  if (!current) return INVALID_CONTEXT;
  if (!image) return INVALID_VALUE;
  struct { uint32_t magic; uint16_t version, header; uint64_t bytes; } fatbin;
  memcpy(&fatbin, image, sizeof fatbin);
  if (fatbin.magic != 0xba55ed50) return INVALID_IMAGE;
  const Image* known = nullptr;
  std::lock_guard<std::mutex> guard(lock);
  for (const Image& i : images) {
    const bool same = i.bytes.size() >= fatbin.header + fatbin.bytes && !memcmp(i.bytes.data(), image, fatbin.header + fatbin.bytes);
    if (same) known = &i;
  }
  if (!known) return INVALID_IMAGE;
  if (!current->loads_images || current->major < 8 || (is_hopper(known->stem) && current->major < 9)) return NO_BINARY_FOR_GPU;
  return *module = new Module{current, known->stem, {}}, SUCCESS;
}
API cuModuleUnload(Module* module) { return delete module, SUCCESS; }
API cuModuleGetFunction(Function** function, Module* module, const char* name) {
  const Kernel* kernel = find_kernel(name, module->stem);
  if (!kernel) return NOT_FOUND;
  std::lock_guard<std::mutex> guard(lock);
  return *function = &module->functions.try_emplace(name, Function{kernel, module}).first->second, SUCCESS;
}
API cuFuncGetParamInfo(Function* f, size_t index, size_t* offset, size_t* size) {
  if (index >= (size_t)f->kernel->parameters) return INVALID_VALUE;
  *offset = f->kernel->layout[index].offset;
  if (size) *size = f->kernel->layout[index].size;
  return SUCCESS;
}
API cuFuncSetAttribute(Function* f, int attribute, int value) {
  if (attribute == 9) return SUCCESS;  // preferred carve-out of shared memory
  if (attribute != 8 || value < 0 || value > f->module->device->shared_optin()) return INVALID_VALUE;
  return f->dynamic_limit = value, SUCCESS;
}
API cuFuncGetAttribute(int* value, int attribute, Function* f) {
  const int major = f->module->device->major * 10;
  const int values[] = {1024, (int)f->kernel->statics_bytes, 0, 0, 64, major, major, 0, f->dynamic_limit, -1};
  if (attribute < 0 || attribute > 9) return INVALID_VALUE;
  return *value = values[attribute], SUCCESS;
}
API cuFuncSetCacheConfig(Function*, int) { return SUCCESS; }
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* f, int threads, size_t shared, unsigned) {
  const Device& d = *f->module->device;
  if (threads <= 0 || threads > 1024 || shared > (size_t)f->dynamic_limit) return *blocks = 0, threads <= 0 ? INVALID_VALUE : SUCCESS;
  const int by_shared = d.shared_per_processor() / (int)(shared + f->kernel->statics_bytes + 1024);
  return *blocks = std::min({2048 / (int)round_up((size_t)threads, 32), by_shared, 32}), SUCCESS;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* f, int threads, size_t shared) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, f, threads, shared, 0);
}

// ---- launches
int standin::prepare(Function* f, const Dimensions& d, void** parameters, Launch& launch) {
  const Device* device = f->module->device;
  if (!d.gx || !d.gy || !d.gz || !d.bx || !d.by || !d.bz || d.gx > 2147483647 || d.gy > 65535 || d.gz > 65535) return INVALID_VALUE;
  if (d.bx > 1024 || d.by > 1024 || d.bz > 64 || (uint64_t)d.bx * d.by * d.bz > 1024) return INVALID_VALUE;
  if (d.shared > (unsigned)f->dynamic_limit || (f->kernel->parameters && !parameters)) return INVALID_VALUE;
  if (d.shared + f->kernel->statics_bytes > (size_t)device->shared_optin()) return LAUNCH_OUT_OF_RESOURCES;
  launch.kernel = f->kernel;
  launch.habits = device->habits;
  launch.hopper = device->major >= 9;
  launch.grid = {d.gx, d.gy, d.gz};
  launch.block = {d.bx, d.by, d.bz};
  launch.shared = d.shared;
  for (int i = 0; i < f->kernel->parameters; i++) {
    memcpy(launch.arguments + f->kernel->layout[i].offset, parameters[i], f->kernel->layout[i].size);
  }
  return SUCCESS;
}
API cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   Stream* s, void** parameters, void** extra) {
  if (extra) return NOT_SUPPORTED;
  if (!f || !device_of(s)) return f ? INVALID_CONTEXT : INVALID_HANDLE;
  Device* device = f->module->device;
  if (device_of(s) != device) return INVALID_HANDLE;
  called(device, __func__);
  auto launch = std::make_shared<Launch>();
  if (const int error = prepare(f, {gx, gy, gz, bx, by, bz, shared}, parameters, *launch)) return error;
  return enqueue(s, [=] {
    device->launches++;
    tick(device);
    run(*launch);
  });
}
struct LaunchAttribute { int id, pad; unsigned value[16]; };
struct LaunchConfig {
  unsigned gx, gy, gz, bx, by, bz, shared;
  Stream* stream;
  LaunchAttribute* attributes;
  unsigned count;
};
API cuLaunchKernelEx(const LaunchConfig* c, Function* f, void** parameters, void** extra) {
  for (unsigned i = 0; i < c->count; i++) {
    const LaunchAttribute& a = c->attributes[i];
    const bool cluster = a.id == 4 && a.value[0] * a.value[1] * a.value[2] > 1, cooperative = a.id == 2 && a.value[0];
    if (cluster || cooperative) return NOT_SUPPORTED;
  }
  return cuLaunchKernel(f, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->shared, c->stream, parameters, extra);
}

// ---- profilers
// Counts the launches between them.
API cuProfilerStart() { return current ? (current->profiled -= current->launches, SUCCESS) : INVALID_CONTEXT; }
API cuProfilerStop() { return current ? (current->profiled += current->launches, SUCCESS) : INVALID_CONTEXT; }
