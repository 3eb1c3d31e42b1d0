// The connections of a rank: to the next one and from the one before, in a ring, by TCP.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

// The emulated identity: where the ranks meet.
struct Meeting {
  char magic[8];
  uint64_t number;
  char address[64];
  uint16_t port;
};

struct Broken : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Ring {
 public:
  Ring(int rank, int size) : rank(rank), size(size) {}
  ~Ring();

  // Opens a port, at which a thread introduces as many ranks as come, and describes it.
  static bool open(Meeting& meeting);
  // Meets the others. Throws Broken.
  void connect(const Meeting& meeting);
  // Sends to the next rank and receives from the one before, at the same time; either may be of no bytes. Throws Broken.
  void shift(const void* out, size_t out_bytes, void* in, size_t in_bytes);

  const int rank, size;
  std::atomic<bool> stop{false};  // ends whatever waits, by Broken

 private:
  int next = -1, previous = -1;
};
