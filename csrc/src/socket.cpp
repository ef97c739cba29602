#include "socket.hpp"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/interrupt.hpp"

namespace asyncdiff {

namespace {

// One way to reach an address.
struct Way {
  sockaddr_storage address{};
  socklen_t size = 0;
  int family() const { return address.ss_family; }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&address); }
};

Way unix_way(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    throw InvalidArgument("the path of a Unix socket has at most " +
                          std::to_string(sizeof address.sun_path - 1) + " bytes: " + path);
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  Way out;
  std::memcpy(&out.address, &address, sizeof address);
  out.size = sizeof address;
  return out;
}

std::vector<Way> ways_to(const SocketAddress& address, bool listening, std::string& why) {
  if (!address.path.empty()) return {unix_way(address.path)};
  if (address.port < 1 || address.port > 65535) {
    throw InvalidArgument("port " + std::to_string(address.port) + ": choose 1 to 65535");
  }
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (listening ? AI_PASSIVE : 0);
  addrinfo* found = nullptr;
  const int code = getaddrinfo(address.host.empty() ? nullptr : address.host.c_str(),
                               std::to_string(address.port).c_str(), &hints, &found);
  if (code != 0) {
    why = gai_strerror(code);
    return {};
  }
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, freeaddrinfo);
  std::vector<Way> out;
  for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
    Way way;
    std::memcpy(&way.address, one->ai_addr, one->ai_addrlen);
    way.size = one->ai_addrlen;
    out.push_back(way);
  }
  return out;
}

// What is said is sent at once (of a Unix socket it always is).
void send_at_once(const Socket& socket) {
  const int on = 1;
  setsockopt(socket.descriptor(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

Socket make(int family) {
  Socket out(socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (out.open() && family != AF_UNIX) send_at_once(out);
  return out;
}

// Whether a process listens at this path; what a killed one left behind can be taken away.
bool is_alive(const Way& way) {
  const Socket probe = make(AF_UNIX);
  return connect(probe.descriptor(), way.get(), way.size) == 0 || errno == EAGAIN;
}

bool bound(const Socket& socket, const Way& way, const std::string& path) {
  if (bind(socket.descriptor(), way.get(), way.size) == 0) return true;
  if (path.empty() || errno != EADDRINUSE) return false;
  if (is_alive(way)) {
    errno = EADDRINUSE;
    return false;
  }
  unlink(path.c_str());
  return bind(socket.descriptor(), way.get(), way.size) == 0;
}

}  // namespace

void Socket::close() {
  if (descriptor_ >= 0) ::close(descriptor_);
  descriptor_ = -1;
}

std::string text_of(const SocketAddress& address) {
  if (!address.path.empty()) return address.path;
  const bool colons = address.host.find(':') != std::string::npos;
  return (colons ? "[" + address.host + "]" : address.host) + ":" + std::to_string(address.port);
}

Socket listen_at(const SocketAddress& address, int backlog) {
  std::string why;
  for (const Way& way : ways_to(address, true, why)) {
    Socket out = make(way.family());
    const int on = 1;
    if (out.open() && way.family() != AF_UNIX) {
      setsockopt(out.descriptor(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    }
    if (out.open() && bound(out, way, address.path) && listen(out.descriptor(), backlog) == 0) {
      return out;
    }
    why = std::strerror(errno);
  }
  throw Error("process 0 cannot listen at " + text_of(address) + ": " + why +
              "; choose an address of this machine and a free port, the same in all processes");
}

Socket accept_from(const Socket& listener) {
  Socket out(accept4(listener.descriptor(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (out.open()) send_at_once(out);
  return out;
}

Socket connect_to(const SocketAddress& address, Clock::time_point limit, std::string& why) {
  for (const Way& way : ways_to(address, false, why)) {
    Socket out = make(way.family());
    if (!out.open()) throw Error(std::string("making a socket: ") + std::strerror(errno));
    if (connect(out.descriptor(), way.get(), way.size) == 0) return out;
    if (errno == EINPROGRESS) {
      std::vector<Interest> all = {{&out, true}};
      wait_for(all, limit);
      int code = 0;
      socklen_t size = sizeof code;
      getsockopt(out.descriptor(), SOL_SOCKET, SO_ERROR, &code, &size);
      if (all[0].ready && code == 0) return out;
      errno = all[0].ready ? code : ETIMEDOUT;
    }
    why = std::strerror(errno);
  }
  return Socket();
}

Progress write_some(const Socket& socket, const std::string& data, std::size_t& done) {
  const ssize_t count =
      send(socket.descriptor(), data.data() + done, data.size() - done, MSG_NOSIGNAL);
  if (count >= 0) {
    done += static_cast<std::size_t>(count);
    return Progress::kSome;
  }
  return errno == EAGAIN || errno == EINTR ? Progress::kNone : Progress::kEnded;
}

Progress read_some(const Socket& socket, std::string& data, std::size_t size) {
  // In pieces: what a stranger says of a size takes no memory.
  char piece[1 << 16];
  const std::size_t most = std::min(size - data.size(), sizeof piece);
  const ssize_t count = recv(socket.descriptor(), piece, most, 0);
  if (count > 0) {
    data.append(piece, static_cast<std::size_t>(count));
    return Progress::kSome;
  }
  if (count == 0) return Progress::kEnded;
  return errno == EAGAIN || errno == EINTR ? Progress::kNone : Progress::kEnded;
}

void wait_for(std::vector<Interest>& all, Clock::time_point limit) {
  constexpr std::chrono::milliseconds kLooks{100};
  std::vector<pollfd> polled;
  for (const Interest& one : all) {
    polled.push_back(
        {one.socket->descriptor(), static_cast<short>(one.write ? POLLOUT : POLLIN), 0});
  }
  while (true) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(limit - Clock::now());
    const auto wait =
        std::clamp(left + std::chrono::milliseconds(1), std::chrono::milliseconds(0), kLooks);
    if (poll(polled.data(), polled.size(), static_cast<int>(wait.count())) > 0) break;
    check_interrupt();
    if (Clock::now() >= limit) return;
  }
  for (std::size_t i = 0; i < all.size(); ++i) all[i].ready = polled[i].revents != 0;
}

}  // namespace asyncdiff
