// What couriers tell each other.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

struct NcclMessage {
  std::uint64_t generation;  // of resets
  std::uint64_t count;       // the bundle's number; or how many
  std::uint64_t to;          // up to which byte of the slot
  std::uint32_t channel;
  std::uint32_t unused;  // every byte has a value
};

// Kinds of messages: a bundle is on its way, up to a byte or all of it; so many are released; this
// courier ends.
constexpr char kPart = 'p', kWhole = 'w', kReleased = 'r', kGoodbye = 'g';

inline std::string bytes_of(const NcclMessage& message) {
  std::string out(sizeof message, '\0');
  std::memcpy(out.data(), &message, sizeof message);
  return out;
}

inline NcclMessage message_in(const std::string& bytes) {
  NcclMessage out{};
  if (bytes.size() != sizeof out) throw NcclError("another courier says what nobody can read");
  std::memcpy(&out, bytes.data(), sizeof out);
  return out;
}

}  // namespace asyncdiff
