// Streams and events. An operation runs at once, unless something before it in its stream still waits: for an event, or for other processes
// (standin_wait). With a seed (STANDIN_STREAMS, standin_streams) every operation waits, and a thread runs the streams one operation at a
// time, each with pauses of its own by that seed, so that a missing event or synchronization shows.
#include <condition_variable>
#include <chrono>
#include <cstdlib>
#include <random>
#include <thread>
#include "driver.h"

using namespace standin;

namespace {

// What cuEventRecord leaves in its stream.
struct Mark {
  std::atomic<bool> reached{false};
  double milliseconds = -1;
};
struct Event {
  bool timed;
  std::shared_ptr<Mark> mark;  // null: not recorded
};

std::atomic<uint64_t> seed{[] {
  const char* text = getenv("STANDIN_STREAMS");
  return text ? strtoull(text, nullptr, 10) : 0ull;
}()};

// Never destroyed: the thread runs until the process ends.
struct Busy {
  std::mutex lock;
  std::condition_variable changed;
  std::set<Stream*> streams;  // that have something waiting
};
Busy& busy = *new Busy;

void pause_us(int microseconds) { std::this_thread::sleep_for(std::chrono::microseconds(microseconds)); }

// Tries the oldest operation of a stream. Only the one thread that runs all streams takes operations away.
bool step(Stream* s) {
  std::unique_lock<std::mutex> guard(s->lock);
  const Attempt& oldest = s->waiting.front();
  guard.unlock();
  if (!oldest()) return false;
  guard.lock();
  s->waiting.pop_front();
  if (s->waiting.empty()) {
    std::lock_guard<std::mutex> all(busy.lock);
    busy.streams.erase(s);
  }
  return true;
}

void run_streams() {
  using Clock = std::chrono::steady_clock;
  std::mt19937_64 random(seed);
  std::map<Stream*, Clock::time_point> held;  // streams that pause, until when
  for (std::vector<Stream*> streams;;) {
    {
      std::unique_lock<std::mutex> guard(busy.lock);
      busy.changed.wait(guard, [] { return !busy.streams.empty(); });
      streams.assign(busy.streams.begin(), busy.streams.end());
    }
    bool moved = false;
    for (Stream* s : streams) {
      if (seed && Clock::now() < held[s]) continue;
      if (seed && random() % 16 == 0) held[s] = Clock::now() + std::chrono::microseconds(random() % 1000);
      else moved |= step(s);
    }
    if (!moved) pause_us(20);
  }
}

// Puts an operation behind all others of its stream.
void wait_in(Stream* s, Attempt attempt) {
  static std::once_flag once;
  std::call_once(once, [] { std::thread(run_streams).detach(); });
  std::lock_guard<std::mutex> guard(s->lock);
  s->has_waited = true;
  s->waiting.push_back(std::move(attempt));
  std::lock_guard<std::mutex> all(busy.lock);
  busy.streams.insert(s);
  busy.changed.notify_one();
}

bool idle(Stream* s) {
  if (is_default(s)) return true;
  std::lock_guard<std::mutex> guard(s->lock);
  return s->waiting.empty();
}

double now(const Device* device) {
  if (device->each_ns) return (double)device->clock_ns / 1e6;
  using namespace std::chrono;
  return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace

bool standin::defers(Stream* s) { return !is_default(s) && !s->capture && (seed || !idle(s)); }

int standin::enqueue(Stream* s, Operation operation) {
  if (!device_of(s)) return INVALID_CONTEXT;
  if (const int error = broken(device_of(s))) return error;
  if (!capturing(s)) {
    if (defers(s)) wait_in(s, [operation = std::move(operation)] { return operation(), true; });
    else operation();
  } else if (s->capture->invalid) {
    return CAPTURE_INVALIDATED;
  } else {
    s->capture->append(std::move(operation));
  }
  return SUCCESS;
}

// Waits until a stream has nothing left to do.
void standin::drain(Stream* s) {
  while (!idle(s)) pause_us(20);
}

// Waits until no stream of a device has anything left to do.
void standin::drain(const Device* device) {
  for (;;) {
    bool found = false;
    {
      std::lock_guard<std::mutex> guard(busy.lock);
      for (const Stream* s : busy.streams) found |= s->device == device;
    }
    if (!found) return;
    pause_us(20);
  }
}

// ---- for other emulated libraries and for tests
// The stream goes on when `attempt` returns true; it is called until then, by one thread, and must not block.
API standin_wait(Stream* s, bool (*attempt)(void*), void* data) {
  if (const int error = refuse_capture(s)) return error;
  if (is_default(s)) {
    while (!attempt(data)) pause_us(20);
    return SUCCESS;
  }
  return wait_in(s, [=] { return attempt(data); }), SUCCESS;
}
extern "C" STANDIN_API void standin_streams(uint64_t to) { seed = to; }
extern "C" STANDIN_API uint64_t standin_seed() { return seed; }

// ---- streams
API cuStreamCreate(Stream** stream, unsigned) {
  if (!current) return INVALID_CONTEXT;
  if (const int error = broken(current)) return error;
  *stream = new Stream;
  return (*stream)->device = current, SUCCESS;
}
API cuStreamCreateWithPriority(Stream** stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }
API cuStreamDestroy_v2(Stream* s) {
  if (is_default(s)) return INVALID_HANDLE;
  if (const int error = broken(s->device)) return error;
  // What still waits is done nevertheless.
  if (!s->has_waited) delete s;
  return SUCCESS;
}
API cuStreamSynchronize(Stream* s) {
  called(device_of(s), __func__);
  if (!device_of(s)) return INVALID_CONTEXT;
  if (const int error = refuse_capture(s)) return error;
  return drain(s), broken(device_of(s));
}
API cuStreamQuery(Stream* s) {
  if (const int error = refuse_capture(s)) return error;
  return idle(s) ? SUCCESS : NOT_READY;
}
API cuStreamWaitEvent(Stream* s, Event* event, unsigned) {
  const std::shared_ptr<Mark> mark = event->mark;
  if (!mark || capturing(s) || (mark->reached && !defers(s))) return SUCCESS;
  if (is_default(s)) {
    while (!mark->reached) pause_us(20);
    return SUCCESS;
  }
  return wait_in(s, [mark] { return mark->reached.load(); }), SUCCESS;
}
API cuLaunchHostFunc(Stream* s, void (*function)(void*), void* data) {
  return enqueue(s, [=] { function(data); });
}
API cuCtxSynchronize() {
  called(current, __func__);
  if (!current) return INVALID_CONTEXT;
  return drain(current), broken(current);
}

// ---- events
API cuEventCreate(Event** event, unsigned flags) {
  if (!current) return INVALID_CONTEXT;
  if (const int error = broken(current)) return error;
  return *event = new Event{!(flags & 2), nullptr}, SUCCESS;
}
API cuEventDestroy_v2(Event* event) {
  if (const int error = broken(current)) return error;
  return delete event, SUCCESS;
}
API cuEventRecord(Event* event, Stream* s) {
  Device* const device = device_of(s);
  const auto mark = std::make_shared<Mark>();
  const int error = enqueue(s, [=] {
    mark->milliseconds = now(device);
    mark->reached = true;
  });
  if (error == SUCCESS) event->mark = mark;
  return error;
}
API cuEventSynchronize(Event* event) {
  called(current, __func__);
  while (event->mark && !event->mark->reached) pause_us(20);
  return broken(current);
}
API cuEventQuery(Event* event) {
  if (const int error = broken(current)) return error;
  return !event->mark || event->mark->reached ? SUCCESS : NOT_READY;
}
API cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {
  if (const int error = broken(current)) return error;
  if (!start->timed || !end->timed || !start->mark || !end->mark) return INVALID_HANDLE;
  if (!start->mark->reached || !end->mark->reached) return NOT_READY;
  return *milliseconds = (float)(end->mark->milliseconds - start->mark->milliseconds), SUCCESS;
}
API cuEventElapsedTime(float* milliseconds, Event* start, Event* end) { return cuEventElapsedTime_v2(milliseconds, start, end); }
