// The emulated libcuda: the driver calls that cudarc makes, executed synchronously, with several devices that behave differently.
// A call that CUDA refuses is refused with the same error.
#include <dlfcn.h>
#include <algorithm>
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
    {ILLEGAL_ADDRESS, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
    {LAUNCH_OUT_OF_RESOURCES, {"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"}},
    {NOT_SUPPORTED, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
    {NOT_READY, {"CUDA_ERROR_NOT_READY", "device not ready"}},
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

std::atomic<bool> initialised{false};

}  // namespace

// ---- settings of a child process, from its environment: driver version, first device, number of devices, the kernel of the first
// device that faults; and a file with a line for each kernel file: stem, library, image, resources of its kernels
namespace {
int setting(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text ? atoi(text) : otherwise;
}
int first() { return std::clamp(setting("STANDIN_FIRST", 0), 0, DEVICES - 1); }
int shown() { return std::clamp(setting("STANDIN_DEVICES", DEVICES), 0, DEVICES - first()); }

void load_kernels(const char* list) {
  // Kernel libraries resolve their symbols in this one.
  Dl_info self;
  dladdr(reinterpret_cast<void*>(&setting), &self);
  dlopen(self.dli_fname, RTLD_NOW | RTLD_GLOBAL | RTLD_NOLOAD);
  std::ifstream lines(list);
  for (std::string stem, library, image, resources; lines >> stem >> library >> image >> resources;) {
    if (!dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) die(dlerror());
    std::ifstream file(image, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    add_image(stem, {bytes.begin(), bytes.end()}, resources.c_str());
  }
}
}  // namespace

// ---- shared
namespace standin {
thread_local Device* current = nullptr;

// Invalidates the capture: the call may not be captured.
int refuse_capture(Stream* s) {
  if (const int error = broken(device_of(s))) return error;
  if (!capturing(s)) return SUCCESS;
  s->capture->invalid = true;
  return CAPTURE_UNSUPPORTED;
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
// From now on each kernel and each on-device copy takes this long by the device's events.
extern "C" STANDIN_API void standin_each_takes(int device, uint64_t ns) { devices[device].each_ns = ns; }
extern "C" STANDIN_API uint64_t standin_profiled(int device) { return devices[device].profiled; }
// The n-th kernel from now on faults: then every call that needs the device fails; with `binding` also making a context current.
extern "C" STANDIN_API void standin_faults(int device, uint64_t n, bool binding) {
  devices[device].until_fault = n;
  devices[device].binding_fails = binding;
}
// Sparse mode: memory is mapped when touched, a multiprocessor for every block, and only `ends` blocks at each end of a grid run.
extern "C" STANDIN_API void standin_sparse(int device, uint64_t ends) {
  devices[device].memory = 1ull << 46;
  devices[device].ends = ends;
}

// ---- errors, devices, contexts
API cuInit(unsigned) {
  if (shown() == 0) return NO_DEVICE;
  if (initialised.exchange(true)) return SUCCESS;
  if (const char* list = getenv("STANDIN_KERNELS")) load_kernels(list);
  devices[first()].until_fault = (uint64_t)setting("STANDIN_FAULT", 0);
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
API cuCtxSetCurrent(Device* context) {
  if (context && context->binding_fails && context->faulted) return ILLEGAL_ADDRESS;
  return current = context, SUCCESS;
}
API cuCtxGetDevice(int* device) {
  if (!current) return INVALID_CONTEXT;
  return *device = (int)(current - devices), SUCCESS;
}
API cuCtxSetFlags(unsigned) { return SUCCESS; }
API cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, SUCCESS; }

API cuDeviceGetDefaultMemPool(Device** pool, int device) { return *pool = &devices[device], SUCCESS; }
API cuDeviceGetMemPool(Device** pool, int device) { return *pool = &devices[device], SUCCESS; }

// ---- profilers
// Launches in between are counted.
API cuProfilerStart() { return current ? (current->profiled -= current->launches, SUCCESS) : INVALID_CONTEXT; }
API cuProfilerStop() { return current ? (current->profiled += current->launches, SUCCESS) : INVALID_CONTEXT; }
