// Shared declarations of the emulated libcuda.
#pragma once
#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>
#include "runtime.h"

#define API extern "C" STANDIN_API int

namespace standin {

enum Error {
  SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700,
  LAUNCH_OUT_OF_RESOURCES = 701, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903,
};

struct Device {
  const char* name;
  int major;
  Habits habits;
  std::atomic<size_t> memory;
  bool loads_images;
  std::atomic<uint64_t> launches{0}, allocations{0}, bytes{0}, profiled{0};
  // Fixed time of every operation on the device's own clock; 0: the host's clock.
  std::atomic<uint64_t> clock_ns{0}, each_ns{0};
  // Blocks that run at each end of a grid, on a sparse device; 0: all.
  std::atomic<uint64_t> ends{0};
  // Kernels until one faults (0: none); whether one has; whether making a context current then fails too.
  std::atomic<uint64_t> until_fault{0};
  std::atomic<bool> faulted{false}, binding_fails{false};
  std::mutex lock;
  std::map<std::string, uint64_t> calls;  // of the driver, by name

  int shared_optin() const { return major >= 9 ? 232448 : major == 8 ? 166912 : 98304; }
  int shared_per_processor() const { return shared_optin() + 1024; }
  int processors() const { return ends ? 1 << 20 : major >= 9 ? 132 : major == 8 ? 108 : 80; }
};

// The sticky error after a kernel fault, until the process ends.
inline int broken(const Device* device) { return device && device->faulted ? ILLEGAL_ADDRESS : SUCCESS; }
inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Resources of a compiled kernel.
struct Resources {
  int registers, statics, threads;

  int registers_of(int block_threads) const;
};
struct Image {
  std::string stem;  // of the kernel file
  std::vector<unsigned char> bytes;
  std::map<std::pair<int, std::string>, Resources> resources;  // by architecture and kernel

  Resources of(const Kernel& kernel, int major) const;
};
void add_image(const std::string& stem, std::vector<unsigned char> bytes, const char* resources);

using Operation = std::function<void()>;
struct Node {
  Operation operation;
  std::vector<Node*> after;
  bool kernel;
};
struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
  bool invalid = false;

  // Appends a node that depends on all others, as capture does.
  void append(Operation operation);
};
using Attempt = std::function<bool()>;  // tries to do an operation: whether it is done
struct Stream {
  Device* device = nullptr;
  std::unique_ptr<Graph> capture;
  std::mutex lock;              // of what follows
  std::deque<Attempt> waiting;  // oldest first
  bool has_waited = false;      // whether anything ever waited
};
struct Module;
struct Function {
  const Kernel* kernel;
  Module* module;
  Resources resources;
  int dynamic_limit;
};
struct Module {
  Device* device;
  const Image* image;
  std::map<std::string, Function> functions;
};

extern thread_local Device* current;  // a context is its device

inline bool is_default(Stream* s) { return reinterpret_cast<uintptr_t>(s) <= 2; }
inline Device* device_of(Stream* s) { return is_default(s) ? current : s->device; }
inline bool capturing(Stream* s) { return !is_default(s) && s->capture; }

// Executes the operation, behind what waits in its stream, or captures it.
int enqueue(Stream* s, Operation operation);
int refuse_capture(Stream* s);
// Whether an operation would wait now.
bool defers(Stream* s);
void drain(Stream* s);
void drain(const Device* device);
// Whether these bytes are inside one allocation of the device.
bool owns(Device* device, uint64_t pointer, size_t bytes);
// Advances the device's own clock by the fixed time of an operation.
void tick(Device* device);
// Counts a driver call.
void called(Device* device, const char* name);
// Whether this thread captures in a mode that refuses calls that may touch other streams.
bool captures_strictly();

struct Dimensions { unsigned gx, gy, gz, bx, by, bz, shared; };
// Checks a launch and fills it.
int prepare(Function* f, const Dimensions& dimensions, void** parameters, Launch& launch);
void carry_out(Device* device, const Launch& launch);

}  // namespace standin
