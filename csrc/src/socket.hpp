// Sockets that never block for longer than they are told.
#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/export.hpp"
#include "asyncdiff/socket_rendezvous.hpp"

namespace asyncdiff {

using Clock = std::chrono::steady_clock;

class ASYNCDIFF_EXPORT Socket {
 public:
  Socket() = default;
  explicit Socket(int descriptor) : descriptor_(descriptor) {}
  ~Socket() { close(); }
  Socket(Socket&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }

  int descriptor() const { return descriptor_; }
  bool open() const { return descriptor_ >= 0; }
  void close();

 private:
  int descriptor_ = -1;
};

std::string text_of(const SocketAddress& address);

// Throws Error where the address cannot be had.
Socket listen_at(const SocketAddress& address, int backlog);
// A connection that has come, or a closed socket.
Socket accept_from(const Socket& listener);
// A connection, or a closed socket where nobody listens yet, within the time; `why` says what was
// in the way. Throws InvalidArgument for an address that means nothing.
Socket connect_to(const SocketAddress& address, Clock::time_point limit, std::string& why);

// What came of reading or writing as much as could be at once.
enum class Progress { kSome, kNone, kEnded };
Progress write_some(const Socket& socket, const std::string& data, std::size_t& done);
// Appends to `data` until it has `size` bytes.
Progress read_some(const Socket& socket, std::string& data, std::size_t size);

// Waits until one of the sockets can be read (or written, where asked), at most until the limit.
// Throws what check_interrupt() throws.
struct Interest {
  const Socket* socket;
  bool write;
  bool ready = false;
};
void wait_for(std::vector<Interest>& all, Clock::time_point limit);

}  // namespace asyncdiff
