// Modules, functions and launches. Registers and static shared memory of a kernel are those of its cubin.
#include <algorithm>
#include <cstring>
#include <fstream>
#include "driver.h"
#include "hopper.h"

using namespace standin;

namespace {

constexpr int DEFAULT_SHARED = 49152, REGISTERS = 65536;

std::mutex lock;  // of what follows
std::vector<std::unique_ptr<Image>> images;

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

int Resources::registers_of(int block_threads) const {
  // Registers are allocated by 256 a warp, warps by four.
  const size_t warps = round_up((block_threads + 31) / 32, 4);
  return (int)(warps * round_up(registers * 32, 256));
}

Resources Image::of(const Kernel& kernel, int major) const {
  const auto found = resources.find({major * 10, kernel.name});
  return found == resources.end() ? Resources{64, 0, 1024} : found->second;
}

void standin::add_image(const std::string& stem, std::vector<unsigned char> bytes, const char* resources) {
  auto image = std::make_unique<Image>(Image{stem, std::move(bytes), {}});
  std::ifstream lines(resources);
  int architecture;
  Resources r;
  for (std::string kernel; lines >> architecture >> kernel >> r.registers >> r.statics >> r.threads;) {
    image->resources[{architecture, kernel}] = r;
  }
  std::lock_guard<std::mutex> guard(lock);
  images.push_back(std::move(image));
}

// ---- for tests
// Tells which kernel file an image is made of: its modules hold the kernels of that file. `resources` names a file with a line for each
// kernel and architecture: architecture, kernel, registers of a thread, bytes of static shared memory, maximum threads of a block. If it is
// empty, resources are guessed.
extern "C" STANDIN_API void standin_image(const char* stem, const unsigned char* bytes, size_t length, const char* resources) {
  add_image(stem, {bytes, bytes + length}, resources);
}
// Visits every registered kernel: name, stem of its file, offset and size of each parameter.
extern "C" STANDIN_API void standin_kernels(void* to, void (*visit)(void* to, const char* name, const char* stem, const Parameter*, int)) {
  for (const Kernel* k : kernels()) visit(to, k->name, stem_of(*k).c_str(), k->layout, k->parameters);
}

// ---- modules and functions
API cuModuleLoadData(Module** module, const void* image) {
  if (!current) return INVALID_CONTEXT;
  if (const int error = broken(current)) return error;
  if (!image) return INVALID_VALUE;
  struct { uint32_t magic; uint16_t version, header; uint64_t bytes; } fatbin;
  memcpy(&fatbin, image, sizeof fatbin);
  if (fatbin.magic != 0xba55ed50) return INVALID_IMAGE;
  const Image* known = nullptr;
  std::lock_guard<std::mutex> guard(lock);
  const size_t bytes = fatbin.header + fatbin.bytes;
  for (const auto& i : images) {
    if (i->bytes.size() >= bytes && !memcmp(i->bytes.data(), image, bytes)) known = i.get();
  }
  if (!known) return INVALID_IMAGE;
  if (!current->loads_images || current->major < 8 || (is_hopper(known->stem) && current->major < 9)) return NO_BINARY_FOR_GPU;
  return *module = new Module{current, known, {}}, SUCCESS;
}
API cuModuleUnload(Module* module) {
  if (const int error = broken(module->device)) return error;
  return delete module, SUCCESS;
}
API cuModuleGetFunction(Function** function, Module* module, const char* name) {
  if (const int error = broken(module->device)) return error;
  const Kernel* kernel = find_kernel(name, module->image->stem);
  if (!kernel) return NOT_FOUND;
  std::lock_guard<std::mutex> guard(lock);
  const Resources resources = module->image->of(*kernel, module->device->major);
  const Function fresh{kernel, module, resources, DEFAULT_SHARED - resources.statics};
  return *function = &module->functions.try_emplace(name, fresh).first->second, SUCCESS;
}
API cuFuncGetParamInfo(Function* f, size_t index, size_t* offset, size_t* size) {
  if (index >= (size_t)f->kernel->parameters) return INVALID_VALUE;
  *offset = f->kernel->layout[index].offset;
  if (size) *size = f->kernel->layout[index].size;
  return SUCCESS;
}
API cuFuncSetAttribute(Function* f, int attribute, int value) {
  if (const int error = broken(f->module->device)) return error;
  if (attribute == 9) return SUCCESS;  // preferred carve-out of shared memory
  if (attribute != 8 || value < 0 || value + f->resources.statics > f->module->device->shared_optin()) return INVALID_VALUE;
  return f->dynamic_limit = value, SUCCESS;
}
API cuFuncGetAttribute(int* value, int attribute, Function* f) {
  if (const int error = broken(f->module->device)) return error;
  const int major = f->module->device->major * 10;
  const auto& [registers, statics, threads] = f->resources;
  const int values[] = {threads, statics, 0, 0, registers, major, major, 0, f->dynamic_limit, -1};
  if (attribute < 0 || attribute > 9) return INVALID_VALUE;
  return *value = values[attribute], SUCCESS;
}
API cuFuncSetCacheConfig(Function*, int) { return SUCCESS; }
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* f, int threads, size_t shared, unsigned) {
  const Device& d = *f->module->device;
  if (threads <= 0 || threads > 1024 || shared > (size_t)f->dynamic_limit) return *blocks = 0, threads <= 0 ? INVALID_VALUE : SUCCESS;
  const int by_shared = d.shared_per_processor() / ((int)shared + f->resources.statics + 1024);
  const int by_registers = REGISTERS / f->resources.registers_of(threads);
  return *blocks = std::min({2048 / (int)round_up((size_t)threads, 32), by_shared, by_registers, 32}), SUCCESS;
}
API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* f, int threads, size_t shared) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, f, threads, shared, 0);
}

// ---- launches
int standin::prepare(Function* f, const Dimensions& d, void** parameters, Launch& launch) {
  const Device* device = f->module->device;
  if (!d.gx || !d.gy || !d.gz || !d.bx || !d.by || !d.bz || d.gx > 2147483647 || d.gy > 65535 || d.gz > 65535) return INVALID_VALUE;
  if (d.bx > 1024 || d.by > 1024 || d.bz > 64 || (uint64_t)d.bx * d.by * d.bz > 1024) return INVALID_VALUE;
  const int threads = (int)(d.bx * d.by * d.bz);
  if (threads > f->resources.threads) return INVALID_VALUE;
  if (d.shared > (unsigned)f->dynamic_limit || (f->kernel->parameters && !parameters)) return INVALID_VALUE;
  if (f->resources.registers_of(threads) > REGISTERS) return LAUNCH_OUT_OF_RESOURCES;
  launch.ends = device->ends;
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
void standin::carry_out(Device* device, const Launch& launch) {
  if (device->faulted) return;
  device->launches++;
  tick(device);
  if (device->until_fault && --device->until_fault == 0) device->faulted = true;
  else run(launch);
}
API cuLaunchKernel(Function* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   Stream* s, void** parameters, void** extra) {
  if (extra) return NOT_SUPPORTED;
  if (!f || !device_of(s)) return f ? INVALID_CONTEXT : INVALID_HANDLE;
  Device* device = f->module->device;
  if (device_of(s) != device) return INVALID_HANDLE;
  called(device, __func__);
  if (const int error = broken(device)) return error;
  auto launch = std::make_shared<Launch>();
  if (const int error = prepare(f, {gx, gy, gz, bx, by, bz, shared}, parameters, *launch)) return error;
  return enqueue(s, [=] { carry_out(device, *launch); });
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
