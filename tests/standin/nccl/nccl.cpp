// The emulated libnccl: what swat calls of it, between processes or threads, in a ring as NCCL's. It uses the emulated driver's streams, and
// device memory as the host's. Communicators that do not block are emulated; results and refusals are NCCL's.
//
// A collective begins when its stream reaches it. With a seed (streams.cpp of the driver) it pauses before, in between and at its end by that
// seed. What it will receive is NaN meanwhile, so that a reader that does not wait shows.
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>
#include "ring.h"

#define API extern "C" __attribute__((visibility("default")))

struct Stream;
extern "C" int standin_wait(Stream* stream, bool (*attempt)(void*), void* data);
extern "C" uint64_t standin_seed();

namespace {

enum Result {
  SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, SYSTEM_ERROR = 2, INTERNAL_ERROR = 3, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6,
  IN_PROGRESS = 7,
};
const char* const TEXTS[] = {
    "no error", "unhandled cuda error (run with NCCL_DEBUG=INFO for details)", "unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "internal error - please report this issue to the NCCL developers", "invalid argument (run with NCCL_DEBUG=WARN for details)",
    "invalid usage (run with NCCL_DEBUG=WARN for details)", "remote process exited or there was a network error", "NCCL operation in progress",
};

enum Kind { REDUCE_SCATTER, REDUCE, ALL_GATHER, BROADCAST };
enum Type { FLOAT32 = 7, BFLOAT16 = 9 };

struct Call {
  int kind, type, root;
  size_t count;  // elements: of one part
  const char* from;
  char* to;

  size_t bytes() const { return count * (type == FLOAT32 ? 4 : 2); }
};

struct Task {
  std::vector<Call> calls;
  bool given = false;
  std::atomic<bool> done{false};
};

float widen(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  return memcpy(&value, &bits, 4), value;
}
uint16_t narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// sums += values, in any alignment.
void add(std::vector<char>& sums, const char* values, int type) {
  const size_t size = type == FLOAT32 ? 4 : 2;
  for (size_t i = 0; i < sums.size(); i += size) {
    if (type == FLOAT32) {
      float a, b;
      memcpy(&a, &sums[i], 4), memcpy(&b, values + i, 4);
      a += b;
      memcpy(&sums[i], &a, 4);
    } else {
      uint16_t a, b;
      memcpy(&a, &sums[i], 2), memcpy(&b, values + i, 2);
      a = narrow(widen(a) + widen(b));
      memcpy(&sums[i], &a, 2);
    }
  }
}

}  // namespace

struct ncclComm {
  ncclComm(int rank, int size, const Meeting& meeting)
      : ring(rank, size), meeting(meeting), random(standin_seed() * 1000 + (uint64_t)rank), worker([this] { work(); }) {}

  void fail(Result result, const std::string& why) {
    std::lock_guard<std::mutex> guard(lock);
    cause = why, state = result;
  }
  void give(const std::shared_ptr<Task>& task) {
    std::lock_guard<std::mutex> guard(lock);
    tasks.push_back(task);
    changed.notify_one();
  }
  void end() {
    ring.stop = true;
    give(nullptr);
    if (worker.joinable()) worker.join();
  }

  Ring ring;
  const Meeting meeting;
  std::atomic<int> state{IN_PROGRESS};
  std::mutex lock;  // of what follows
  std::condition_variable changed;
  std::deque<std::shared_ptr<Task>> tasks;
  std::string cause;
  bool finalizing = false;

 private:
  void work() {
    try {
      ring.connect(meeting);
      state = SUCCESS;
      while (const std::shared_ptr<Task> task = next()) {
        for (const Call& call : task->calls) run(call);
        task->done = true;
      }
    } catch (const Broken& why) {
      // Between GPUs of one machine NCCL does not notice the end of a process.
      const char* mode = getenv("STANDIN_NCCL");
      if (!mode || strcmp(mode, "silent")) fail(REMOTE_ERROR, why.what());
    }
  }

  // Null at the end.
  std::shared_ptr<Task> next() {
    std::unique_lock<std::mutex> guard(lock);
    if (tasks.empty() && finalizing) {
      count_sent();
      state = SUCCESS, finalizing = false;
    }
    changed.wait(guard, [this] { return !tasks.empty() || finalizing; });
    if (tasks.empty()) return guard.unlock(), next();
    auto task = tasks.front();
    tasks.pop_front();
    return task;
  }

  // Bytes that the rank has sent go into the file rank-R of the folder STANDIN_NCCL_SENT.
  void count_sent() {
    const char* folder = getenv("STANDIN_NCCL_SENT");
    if (!folder) return;
    std::FILE* const file = std::fopen((std::string(folder) + "/rank-" + std::to_string(ring.rank)).c_str(), "w");
    if (file) std::fprintf(file, "%llu\n", (unsigned long long)sent), std::fclose(file);
  }

  void pause() {
    if (standin_seed()) std::this_thread::sleep_for(std::chrono::microseconds(random() % 8 ? random() % 50 : random() % 3000));
  }

  void send_receive(const void* out, size_t out_bytes, void* in, size_t in_bytes) {
    ring.shift(out, out_bytes, in, in_bytes);
    sent += out_bytes;
  }

  // All ranks must make the same calls: NCCL would hang, or mix them up.
  void agree(const Call& call) {
    const int64_t own[4] = {call.kind, call.type, call.root, (int64_t)call.count};
    int64_t theirs[4];
    ring.shift(own, sizeof own, theirs, sizeof theirs);
    if (!memcmp(own, theirs, sizeof own)) return;
    fprintf(stderr, "stand-in NCCL: rank %d makes another call than the rank before it\n", ring.rank);
    abort();
  }

  void run(const Call& call) {
    const int rank = ring.rank, size = ring.size;
    const size_t bytes = call.bytes();
    const auto part = [&](int of) { return (size_t)((of % size + size) % size) * bytes; };
    const int place = ((rank - call.root) % size + size) % size;  // behind the root
    // What is received is undefined until the end.
    if (call.kind == ALL_GATHER) {
      if (call.to + part(rank) != call.from) memcpy(call.to + part(rank), call.from, bytes);
      for (int of = rank + 1; of < rank + size; of++) memset(call.to + part(of), 0xff, bytes);
    } else if (call.kind == BROADCAST && place != 0) {
      memset(call.to, 0xff, bytes);
    }
    pause();
    if (size > 1) agree(call);
    std::vector<char> sums, received(bytes);
    switch (call.kind) {
      case REDUCE_SCATTER:
        // The sum of a part begins behind its own rank, and ends there.
        sums.assign(call.from + part(rank - 1), call.from + part(rank - 1) + bytes);
        for (int k = 1; k < size; k++) {
          send_receive(sums.data(), bytes, received.data(), bytes);
          sums = received;
          add(sums, call.from + part(rank - k - 1), call.type);
          pause();
        }
        memcpy(call.to, sums.data(), bytes);
        break;
      case REDUCE:
        sums.assign(call.from, call.from + bytes);
        if (place != 1 && size > 1) {
          send_receive(nullptr, 0, received.data(), bytes);
          sums = received;
          add(sums, call.from, call.type);
        }
        pause();
        if (place != 0) send_receive(sums.data(), bytes, nullptr, 0);
        else memcpy(call.to, sums.data(), bytes);
        break;
      case ALL_GATHER:
        for (int k = 0; k + 1 < size; k++) {
          // Into the device's memory at the end only.
          const char* out = k ? received.data() : call.from;
          std::vector<char> in(bytes);
          send_receive(out, bytes, in.data(), bytes);
          received = in;
          pause();
          memcpy(call.to + part(rank - k - 1), received.data(), bytes);
        }
        break;
      case BROADCAST:
        if (place != 0) send_receive(nullptr, 0, received.data(), bytes);
        else received.assign(call.from, call.from + bytes);
        pause();
        if (place != size - 1) send_receive(received.data(), bytes, nullptr, 0);
        memcpy(call.to, received.data(), bytes);
        break;
    }
    pause();
  }

  uint64_t sent = 0;
  std::mt19937_64 random;
  std::thread worker;
};

namespace {

thread_local int depth = 0;
thread_local struct Group {
  std::shared_ptr<ncclComm> comm;
  Stream* stream = nullptr;
  std::vector<Call> calls;
} group;

// What the stream waits for.
struct Waiting {
  std::shared_ptr<ncclComm> comm;
  std::shared_ptr<Task> task;
};
bool attempt(void* data) {
  auto* const waiting = static_cast<Waiting*>(data);
  if (!waiting->task->given) {
    waiting->task->given = true;
    waiting->comm->give(waiting->task);
  }
  if (!waiting->task->done && !waiting->comm->ring.stop) return false;
  return delete waiting, true;
}

using Handle = std::shared_ptr<ncclComm>*;

int end_group() {
  if (group.calls.empty()) return SUCCESS;
  auto task = std::make_shared<Task>();
  task->calls.swap(group.calls);
  const int error = standin_wait(group.stream, attempt, new Waiting{group.comm, task});
  group.comm.reset();
  if (error) return UNHANDLED_CUDA_ERROR;
  return standin_seed() % 2 ? IN_PROGRESS : SUCCESS;
}

int collective(const Call& call, Handle comm, Stream* stream) {
  if (!comm || (call.type != FLOAT32 && call.type != BFLOAT16)) return INVALID_ARGUMENT;
  if (call.root < 0 || call.root >= (*comm)->ring.size) return INVALID_ARGUMENT;
  if (const int state = (*comm)->state) return state == IN_PROGRESS ? INVALID_USAGE : state;
  if (!group.calls.empty() && (group.comm != *comm || group.stream != stream)) return INVALID_USAGE;
  group.comm = *comm, group.stream = stream;
  group.calls.push_back(call);
  return depth ? SUCCESS : end_group();
}

// As ncclConfig_t begins.
struct Config {
  size_t size;
  unsigned magic, version;
  int blocking;
};

}  // namespace

API int ncclGetVersion(int* version) {
  const char* text = getenv("STANDIN_NCCL_VERSION");
  return *version = text ? atoi(text) : 22403, SUCCESS;
}
API int ncclGetUniqueId(Meeting* id) {
  static_assert(sizeof(Meeting) <= 128, "fits an identity");
  return Ring::open(*id) ? SUCCESS : SYSTEM_ERROR;
}
struct Id { char bytes[128]; };
API int ncclCommInitRankConfig(Handle* comm, int size, Id id, int rank, const Config* config) {
  Meeting meeting;
  memcpy(&meeting, id.bytes, sizeof meeting);
  *comm = nullptr;
  if (size < 1 || rank < 0 || rank >= size || memcmp(meeting.magic, "standin", 8)) return INVALID_ARGUMENT;
  if (!config || config->magic != 0xcafebeef || config->blocking != 0) return INVALID_ARGUMENT;
  *comm = new std::shared_ptr<ncclComm>(new ncclComm(rank, size, meeting));
  return IN_PROGRESS;
}
API int ncclCommGetAsyncError(Handle comm, int* state) {
  if (!comm) return INVALID_ARGUMENT;
  return *state = (*comm)->state, SUCCESS;
}
API int ncclCommFinalize(Handle comm) {
  std::lock_guard<std::mutex> guard((*comm)->lock);
  if ((*comm)->state != SUCCESS) return (*comm)->state;
  (*comm)->state = IN_PROGRESS, (*comm)->finalizing = true;
  return (*comm)->changed.notify_one(), IN_PROGRESS;
}
API int ncclCommAbort(Handle comm) {
  (*comm)->end();
  return delete comm, SUCCESS;
}
API int ncclCommDestroy(Handle comm) { return ncclCommAbort(comm); }
API const char* ncclGetErrorString(int result) { return result >= 0 && result <= IN_PROGRESS ? TEXTS[result] : "unknown result code"; }
API const char* ncclGetLastError(Handle comm) {
  thread_local std::string text;
  if (!comm) return "";
  std::lock_guard<std::mutex> guard((*comm)->lock);
  return text = (*comm)->cause, text.c_str();
}
API int ncclGroupStart() { return depth++, SUCCESS; }
API int ncclGroupEnd() {
  if (depth == 0) return INVALID_USAGE;
  return --depth ? SUCCESS : end_group();
}
API int ncclReduceScatter(const char* from, char* to, size_t count, int type, int operation, Handle comm, Stream* stream) {
  return operation ? INVALID_ARGUMENT : collective({REDUCE_SCATTER, type, 0, count, from, to}, comm, stream);
}
API int ncclReduce(const char* from, char* to, size_t count, int type, int operation, int root, Handle comm, Stream* stream) {
  return operation ? INVALID_ARGUMENT : collective({REDUCE, type, root, count, from, to}, comm, stream);
}
API int ncclAllGather(const char* from, char* to, size_t count, int type, Handle comm, Stream* stream) {
  return collective({ALL_GATHER, type, 0, count, from, to}, comm, stream);
}
API int ncclBroadcast(const char* from, char* to, size_t count, int type, int root, Handle comm, Stream* stream) {
  return collective({BROADCAST, type, root, count, from, to}, comm, stream);
}
