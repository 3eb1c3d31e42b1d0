// libcuda's stand-in: the driver calls that cudarc makes, carried out at once, over several devices that behave differently.
// Device memory is NaN when allocated and ends before a page that cannot be touched. A call that CUDA refuses is refused
// with the same error.
#include <sys/mman.h>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include "hopper.h"

using namespace standin;

#define API extern "C" STANDIN_API int

namespace {

enum Error {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_OUT_OF_RESOURCES = 701,
  NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903, UPDATE_FAILURE = 910,
};
const std::map<int, std::pair<const char*, const char*>> ERRORS = {
    {SUCCESS, {"CUDA_SUCCESS", "no error"}},
    {INVALID_VALUE, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {OUT_OF_MEMORY, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {NOT_INITIALIZED, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
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
    {UPDATE_FAILURE, {"CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE", "the graph update was not performed"}},
};

struct Device {
  const char* name;
  int major;
  Habits habits;
  size_t memory;
  bool loads_images;
  std::atomic<uint64_t> launches{0}, allocations{0}, bytes{0}, profiled{0};

  int shared_optin() const { return major >= 9 ? 232448 : major == 8 ? 166912 : 98304; }
  int shared_per_processor() const { return shared_optin() + 1024; }
  int processors() const { return major >= 9 ? 132 : major == 8 ? 108 : 80; }
};
constexpr size_t GIB = 1ull << 30;
constexpr bool LATE = true, EARLY = false, DOWN = true, UP = false;
Device devices[] = {
    {"stand-in GPU 9.0, late", 9, {LATE, UP}, 64 * GIB, true},
    {"stand-in GPU 9.0, early", 9, {EARLY, DOWN}, 64 * GIB, true},
    {"stand-in GPU 8.0, late", 8, {LATE, DOWN}, 64 * GIB, true},
    {"stand-in GPU 8.0, early", 8, {EARLY, UP}, 64 * GIB, true},
    {"stand-in GPU 7.0, too old", 7, {LATE, UP}, 64 * GIB, true},
    {"stand-in GPU 9.0, 1 MiB of memory", 9, {LATE, UP}, 1 << 20, true},
    {"stand-in GPU 9.0, loads no image", 9, {LATE, UP}, 64 * GIB, false},
};
constexpr int DEVICES = sizeof devices / sizeof devices[0];

using Operation = std::function<void()>;
struct Graph {
  std::vector<Operation> operations;
  bool invalid = false;
};
struct Stream {
  Device* device;
  std::unique_ptr<Graph> capture;
};
struct Event {
  bool timed;
  double milliseconds = -1;  // −1: not recorded
};
struct Module;
struct Function {
  const Kernel* kernel;
  Module* module;
  int dynamic_limit = 49152;
};
struct Module {
  Device* device;
  std::string stem;  // of the kernel file; empty: any
  std::map<std::string, Function> functions;
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
std::atomic<bool> initialised{false};
thread_local Device* current = nullptr;  // a context is its device

bool is_default(Stream* s) { return reinterpret_cast<uintptr_t>(s) <= 2; }
Device* device_of(Stream* s) { return is_default(s) ? current : s->device; }
bool capturing(Stream* s) { return !is_default(s) && s->capture; }

int enqueue(Stream* s, Operation operation) {
  if (!device_of(s)) return INVALID_CONTEXT;
  if (!capturing(s)) operation();
  else if (s->capture->invalid) return CAPTURE_INVALIDATED;
  else s->capture->operations.push_back(std::move(operation));
  return SUCCESS;
}
// What may not be captured ends the capture.
int refuse_capture(Stream* s) {
  if (!capturing(s)) return SUCCESS;
  s->capture->invalid = true;
  return CAPTURE_UNSUPPORTED;
}

double now() {
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

// Whether these bytes are inside one allocation of the device.
bool owns(Device* device, uint64_t pointer, size_t bytes) {
  std::lock_guard<std::mutex> guard(lock);
  auto next = allocations.upper_bound(pointer);
  if (next == allocations.begin()) return false;
  const auto& [start, a] = *--next;
  return a.device == device && pointer + bytes <= start + a.bytes;
}

int copy(void* to, const void* from, size_t bytes, Stream* s) {
  return enqueue(s, [=] { memmove(to, from, bytes); });
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

// ---- for tests
extern "C" STANDIN_API uint64_t standin_launches(int device) { return devices[device].launches; }
extern "C" STANDIN_API uint64_t standin_allocations(int device) { return devices[device].allocations; }
extern "C" STANDIN_API uint64_t standin_bytes(int device) { return devices[device].bytes; }
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
  if (!initialised.exchange(true)) watch_for_faults();
  return SUCCESS;
}
API cuDriverGetVersion(int* version) { return *version = 13000, SUCCESS; }
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
  return *count = DEVICES, SUCCESS;
}
API cuDeviceGet(int* device, int ordinal) {
  if (!initialised) return NOT_INITIALIZED;
  if (ordinal < 0 || ordinal >= DEVICES) return INVALID_DEVICE;
  return *device = ordinal, SUCCESS;
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
API cuCtxSynchronize() { return current ? SUCCESS : INVALID_CONTEXT; }
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
API cuStreamSynchronize(Stream* s) { return device_of(s) ? refuse_capture(s) : INVALID_CONTEXT; }
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
  return enqueue(s, [=] { event->milliseconds = now(); });
}
API cuEventSynchronize(Event*) { return SUCCESS; }
API cuEventQuery(Event*) { return SUCCESS; }
API cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
  if (!start->timed || !end->timed || start->milliseconds < 0 || end->milliseconds < 0) return INVALID_HANDLE;
  return *milliseconds = (float)(end->milliseconds - start->milliseconds), SUCCESS;
}
API cuEventElapsedTime(float* milliseconds, Event* start, Event* end) { return cuEventElapsedTime_v2(milliseconds, start, end); }

// ---- memory
API cuMemAlloc_v2(uint64_t* pointer, size_t bytes) { return allocate(current, pointer, bytes); }
API cuMemAllocAsync(uint64_t* pointer, size_t bytes, Stream* s) {
  if (const int error = refuse_capture(s)) return error;
  return allocate(device_of(s), pointer, bytes);
}
API cuMemAllocFromPoolAsync(uint64_t* pointer, size_t bytes, void*, Stream* s) { return cuMemAllocAsync(pointer, bytes, s); }
API cuMemFree_v2(uint64_t pointer) { return release_memory(pointer); }
API cuMemFreeAsync(uint64_t pointer, Stream* s) {
  if (const int error = refuse_capture(s)) return error;
  return release_memory(pointer);
}
API cuMemGetInfo_v2(size_t* available, size_t* total) {
  if (!current) return INVALID_CONTEXT;
  return *total = current->memory, *available = *total - current->bytes, SUCCESS;
}
API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  return posix_memalign(pointer, PAGE, std::max<size_t>(bytes, 1)) ? OUT_OF_MEMORY : SUCCESS;
}
API cuMemFreeHost(void* pointer) { return free(pointer), SUCCESS; }
API cuDeviceGetDefaultMemPool(Device** pool, int device) { return *pool = &devices[device], SUCCESS; }
API cuDeviceGetMemPool(Device** pool, int device) { return *pool = &devices[device], SUCCESS; }
API cuMemPoolSetAttribute(Device*, int, void*) { return SUCCESS; }
API cuMemPoolGetAttribute(Device* pool, int attribute, uint64_t* value) {
  return *value = attribute >= 5 ? pool->bytes.load() : 0, SUCCESS;
}
API cuMemPoolTrimTo(Device*, size_t) { return SUCCESS; }

API cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, Stream* s) {
  if (bytes && !owns(device_of(s), to, bytes)) return INVALID_VALUE;
  return copy(reinterpret_cast<void*>(to), from, bytes, s);
}
API cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, Stream* s) {
  if (bytes && !owns(device_of(s), from, bytes)) return INVALID_VALUE;
  return copy(to, reinterpret_cast<void*>(from), bytes, s);
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, Stream* s) {
  if (bytes && (!owns(device_of(s), to, bytes) || !owns(device_of(s), from, bytes))) return INVALID_VALUE;
  return copy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes, s);
}
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) { return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr); }
API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) { return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr); }
API cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t bytes) { return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr); }
API cuMemsetD8Async(uint64_t to, unsigned char value, size_t count, Stream* s) { return fill(to, value, count, s); }
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
API cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   Stream* s, void** parameters, void** extra) {
  if (extra) return NOT_SUPPORTED;
  if (!f || !device_of(s)) return f ? INVALID_CONTEXT : INVALID_HANDLE;
  Device* device = f->module->device;
  if (device_of(s) != device) return INVALID_HANDLE;
  if (!gx || !gy || !gz || !bx || !by || !bz || gx > 2147483647 || gy > 65535 || gz > 65535) return INVALID_VALUE;
  if (bx > 1024 || by > 1024 || bz > 64 || (uint64_t)bx * by * bz > 1024) return INVALID_VALUE;
  if (shared > (unsigned)f->dynamic_limit || (f->kernel->parameters && !parameters)) return INVALID_VALUE;
  if (shared + f->kernel->statics_bytes > (size_t)device->shared_optin()) return LAUNCH_OUT_OF_RESOURCES;
  const auto start = [&](Launch& launch) {
    launch.kernel = f->kernel;
    launch.habits = device->habits;
    launch.grid = {gx, gy, gz};
    launch.block = {bx, by, bz};
    launch.shared = shared;
    for (int i = 0; i < f->kernel->parameters; i++) {
      memcpy(launch.arguments + f->kernel->layout[i].offset, parameters[i], f->kernel->layout[i].size);
    }
  };
  if (!capturing(s)) {
    Launch launch;
    start(launch);
    device->launches++;
    return run(launch), SUCCESS;
  }
  auto launch = std::make_shared<Launch>();
  start(*launch);
  return enqueue(s, [=] {
    device->launches++;
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

// ---- graphs
API cuStreamBeginCapture_v2(Stream* s, int) {
  if (is_default(s)) return CAPTURE_UNSUPPORTED;
  if (s->capture) return INVALID_VALUE;
  return s->capture.reset(new Graph), SUCCESS;
}
API cuStreamIsCapturing(Stream* s, int* status) { return *status = !capturing(s) ? 0 : s->capture->invalid ? 2 : 1, SUCCESS; }
API cuStreamEndCapture(Stream* s, Graph** graph) {
  if (!capturing(s)) return CAPTURE_UNMATCHED;
  *graph = s->capture.release();
  if (!(*graph)->invalid) return SUCCESS;
  delete *graph;
  return *graph = nullptr, CAPTURE_INVALIDATED;
}
API cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) { return *executable = new Graph(*graph), SUCCESS; }
API cuGraphGetNodes(Graph* graph, void** nodes, size_t* count) { return nodes ? NOT_SUPPORTED : (*count = graph->operations.size(), SUCCESS); }
API cuGraphUpload(Graph*, Stream*) { return SUCCESS; }
API cuGraphLaunch(Graph* executable, Stream* s) {
  return enqueue(s, [=] { for (const Operation& operation : executable->operations) operation(); });
}
API cuGraphExecUpdate_v2(Graph* executable, Graph* graph, int* result) {
  const bool same = executable->operations.size() == graph->operations.size();
  if (result) *result = same ? 0 : 2;
  if (!same) return UPDATE_FAILURE;
  return executable->operations = graph->operations, SUCCESS;
}
API cuGraphExecDestroy(Graph* executable) { return delete executable, SUCCESS; }
API cuGraphDestroy(Graph* graph) { return delete graph, SUCCESS; }
// Counts the launches between them.
API cuProfilerStart() { return current ? (current->profiled -= current->launches, SUCCESS) : INVALID_CONTEXT; }
API cuProfilerStop() { return current ? (current->profiled += current->launches, SUCCESS) : INVALID_CONTEXT; }
