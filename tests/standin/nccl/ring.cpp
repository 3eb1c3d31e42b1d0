#include "ring.h"
#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

namespace {

constexpr int TICK_MS = 20;  // between two looks at `stop`

struct Hello {
  uint64_t number;
  int rank, size;
  char address[64];
  uint16_t port;
};

// The address of the network that NCCL_SOCKET_IFNAME names, else of the loopback.
void own_address(char (&text)[64]) {
  strcpy(text, "127.0.0.1");
  const char* name = getenv("NCCL_SOCKET_IFNAME");
  ifaddrs* all = nullptr;
  if (!name || getifaddrs(&all)) return;
  for (const ifaddrs* a = all; a; a = a->ifa_next) {
    if (!a->ifa_addr || a->ifa_addr->sa_family != AF_INET || strcmp(a->ifa_name, name)) continue;
    inet_ntop(AF_INET, &reinterpret_cast<sockaddr_in*>(a->ifa_addr)->sin_addr, text, sizeof text);
  }
  freeifaddrs(all);
}

int listen_at(const char* address, uint16_t& port) {
  const int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in at = {};
  at.sin_family = AF_INET;
  inet_pton(AF_INET, address, &at.sin_addr);
  socklen_t length = sizeof at;
  auto* const raw = reinterpret_cast<sockaddr*>(&at);
  if (s < 0 || bind(s, raw, length) || listen(s, 256) || getsockname(s, raw, &length)) return s < 0 ? s : (close(s), -1);
  return port = ntohs(at.sin_port), s;
}

int connect_to(const char* address, uint16_t port, const std::atomic<bool>& stop) {
  sockaddr_in at = {};
  at.sin_family = AF_INET;
  at.sin_port = htons(port);
  inet_pton(AF_INET, address, &at.sin_addr);
  while (!stop) {
    const int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (!connect(s, reinterpret_cast<sockaddr*>(&at), sizeof at)) {
      const int on = 1;
      return setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), s;
    }
    close(s);
    std::this_thread::sleep_for(std::chrono::milliseconds(TICK_MS));
  }
  throw Broken("aborted");
}

bool ready(int s, short what) {
  pollfd wait = {s, what, 0};
  return poll(&wait, 1, TICK_MS) > 0;
}

int accept_from(int listener, const std::atomic<bool>& stop) {
  while (!stop) {
    if (ready(listener, POLLIN)) return accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
  }
  throw Broken("aborted");
}

// Moves some bytes, at once: how many; throws where the other side has closed.
size_t send_some(int s, const void* bytes, size_t count) {
  const ssize_t n = send(s, bytes, count, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (n < 0 && errno != EAGAIN && errno != EINTR) throw Broken("connection closed by remote peer");
  return n < 0 ? 0 : (size_t)n;
}
size_t receive_some(int s, void* bytes, size_t count) {
  const ssize_t n = recv(s, bytes, count, MSG_DONTWAIT);
  if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) throw Broken("connection closed by remote peer");
  return n < 0 ? 0 : (size_t)n;
}

void send_all(int s, const void* bytes, size_t count, const std::atomic<bool>& stop) {
  for (size_t sent = 0; sent < count;) {
    if (stop) throw Broken("aborted");
    if (ready(s, POLLOUT)) sent += send_some(s, static_cast<const char*>(bytes) + sent, count - sent);
  }
}
void receive_all(int s, void* bytes, size_t count, const std::atomic<bool>& stop) {
  for (size_t received = 0; received < count;) {
    if (stop) throw Broken("aborted");
    if (ready(s, POLLIN)) received += receive_some(s, static_cast<char*>(bytes) + received, count - received);
  }
}

// Tells each rank where the next one is, when all have come.
void introduce(int listener, uint64_t number) {
  static const std::atomic<bool> never{false};
  std::vector<Hello> came;
  std::vector<int> sockets;
  for (size_t count = 0, size = 1; count < size;) {
    const int s = accept_from(listener, never);
    Hello hello;
    try {
      receive_all(s, &hello, sizeof hello, never);
    } catch (const Broken&) {
      close(s);
      continue;
    }
    size = (size_t)hello.size;
    if (came.size() < size) came.resize(size), sockets.resize(size, -1);
    if (hello.number != number || sockets[(size_t)hello.rank] >= 0) {
      close(s);
      continue;
    }
    came[(size_t)hello.rank] = hello, sockets[(size_t)hello.rank] = s, count++;
  }
  for (size_t rank = 0; rank < came.size(); rank++) {
    try {
      send_all(sockets[rank], &came[(rank + 1) % came.size()], sizeof(Hello), never);
    } catch (const Broken&) {
    }
    close(sockets[rank]);
  }
  close(listener);
}

}  // namespace

Ring::~Ring() {
  for (const int s : {next, previous}) {
    if (s >= 0) close(s);
  }
}

bool Ring::open(Meeting& meeting) {
  meeting = {};
  memcpy(meeting.magic, "standin", 8);
  meeting.number = (uint64_t)std::random_device{}() << 32 | std::random_device{}();
  own_address(meeting.address);
  const int listener = listen_at(meeting.address, meeting.port);
  if (listener < 0) return false;
  std::thread(introduce, listener, meeting.number).detach();
  return true;
}

void Ring::connect(const Meeting& meeting) {
  Hello own = {meeting.number, rank, size, {}, 0};
  own_address(own.address);
  const int listener = listen_at(own.address, own.port);
  if (listener < 0) throw Broken("cannot open a port");
  const int root = connect_to(meeting.address, meeting.port, stop);
  Hello after;
  try {
    send_all(root, &own, sizeof own, stop);
    receive_all(root, &after, sizeof after, stop);
    next = connect_to(after.address, after.port, stop);
    send_all(next, &meeting.number, sizeof meeting.number, stop);
    uint64_t number = 0;
    while (number != meeting.number) {
      if (previous >= 0) close(previous);
      previous = accept_from(listener, stop);
      receive_all(previous, &number, sizeof number, stop);
    }
  } catch (const Broken&) {
    close(root), close(listener);
    throw;
  }
  close(root), close(listener);
}

void Ring::shift(const void* out, size_t out_bytes, void* in, size_t in_bytes) {
  size_t sent = 0, received = 0;
  while (sent < out_bytes || received < in_bytes) {
    if (stop) throw Broken("aborted");
    pollfd waits[2] = {{sent < out_bytes ? next : -1, POLLOUT, 0}, {received < in_bytes ? previous : -1, POLLIN, 0}};
    if (poll(waits, 2, TICK_MS) <= 0) continue;
    if (waits[0].revents) sent += send_some(next, static_cast<const char*>(out) + sent, out_bytes - sent);
    if (waits[1].revents) received += receive_some(previous, static_cast<char*>(in) + received, in_bytes - received);
  }
}
