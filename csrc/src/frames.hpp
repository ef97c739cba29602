// Messages of a rendezvous between two processes that know each other: a length, what it is, the
// bytes, and a proof that it is the next message of the other side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/export.hpp"
#include "socket.hpp"

namespace asyncdiff {

// Kinds of messages: what a process says, or what everybody said; or why process 0 ends it all, and
// because of whom.
constexpr char kSaid = 's', kLost = 'l', kLate = 't';

// Texts as bytes, each after its length.
ASYNCDIFF_EXPORT std::string packed(const std::vector<std::string>& texts);
// Throws Error where they cannot be read.
ASYNCDIFF_EXPORT std::vector<std::string> unpacked(const std::string& bytes);

struct Frame {
  char kind = 0;
  std::string payload;
};

// One side of a connection.
class ASYNCDIFF_EXPORT Wire {
 public:
  // The two sides have different roles, so that nobody is sent back what it said.
  Wire(Socket socket, std::string key, char role, char their_role)
      : socket_(std::move(socket)), key_(std::move(key)), role_(role), their_role_(their_role) {}

  const Socket& socket() const { return socket_; }

  void put(char kind, const std::string& payload);
  // Writes what can be written.
  Progress write();
  bool written() const { return done_ == out_.size(); }

  // Says, as far as that can be done at once, why all ends: kLost or kLate, and of whom.
  void tell_end(char kind, int process, const std::string& reason);

  // Reads what can be read; there() once a message is whole, which take() then gives. Throws Error
  // for a message that is not of the other side.
  Progress read();
  bool there() const { return whole_; }
  Frame take();

 private:
  std::string proof(char role, std::uint64_t number, const std::string& framed) const;

  Socket socket_;
  std::string key_;
  char role_, their_role_;
  std::uint64_t sent_ = 0, received_ = 0;  // messages
  std::string out_;
  std::size_t done_ = 0;
  std::string in_;
  bool whole_ = false;
};

}  // namespace asyncdiff
