// What the parts of libcuda's stand-in share.
#pragma once
#include <atomic>
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
  INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_OUT_OF_RESOURCES = 701,
  NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903,
};

struct Device {
  const char* name;
  int major;
  Habits habits;
  size_t memory;
  bool loads_images;
  std::atomic<uint64_t> launches{0}, allocations{0}, bytes{0}, profiled{0};
  // A clock of its own, on which whatever the device runs takes equally long; 0: the host's clock.
  std::atomic<uint64_t> clock_ns{0}, each_ns{0};
  std::mutex lock;
  std::map<std::string, uint64_t> calls;  // of the driver, by name

  int shared_optin() const { return major >= 9 ? 232448 : major == 8 ? 166912 : 98304; }
  int shared_per_processor() const { return shared_optin() + 1024; }
  int processors() const { return major >= 9 ? 132 : major == 8 ? 108 : 80; }
};

using Operation = std::function<void()>;
struct Node {
  Operation operation;
  std::vector<Node*> after;
  bool kernel;
};
struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
  bool invalid = false;

  // A node behind all others, as capture makes it.
  void append(Operation operation);
};
struct Stream {
  Device* device;
  std::unique_ptr<Graph> capture;
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

extern thread_local Device* current;  // a context is its device

inline bool is_default(Stream* s) { return reinterpret_cast<uintptr_t>(s) <= 2; }
inline Device* device_of(Stream* s) { return is_default(s) ? current : s->device; }
inline bool capturing(Stream* s) { return !is_default(s) && s->capture; }

// Carries it out, or captures it.
int enqueue(Stream* s, Operation operation);
// Whether these bytes are inside one allocation of the device.
bool owns(Device* device, uint64_t pointer, size_t bytes);
// Moves the device's own clock on by what each operation takes.
void tick(Device* device);
// Counts a call of the driver.
void called(Device* device, const char* name);
// Whether this thread captures in a mode in which what may touch other streams is refused.
bool captures_strictly();

struct Dimensions { unsigned gx, gy, gz, bx, by, bz, shared; };
// Checks a launch and fills it.
int prepare(Function* f, const Dimensions& dimensions, void** parameters, Launch& launch);

}  // namespace standin
