// Writing to and reading from a ring of the board.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "board.hpp"

namespace asyncdiff {

inline std::size_t room_in(const BoardRing& ring) {
  return BoardRing::kBytes - static_cast<std::size_t>(ring.written.load(std::memory_order_relaxed) -
                                                      ring.read.load(std::memory_order_acquire));
}

inline std::size_t bytes_in(const BoardRing& ring) {
  return static_cast<std::size_t>(ring.written.load(std::memory_order_acquire) -
                                  ring.read.load(std::memory_order_relaxed));
}

// As many bytes as fit. Returns how many.
inline std::size_t write_some(BoardRing& ring, const char* from, std::size_t nbytes) {
  const std::uint64_t written = ring.written.load(std::memory_order_relaxed);
  const std::size_t count = std::min(nbytes, room_in(ring));
  for (std::size_t done = 0; done < count;) {
    const auto at = static_cast<std::size_t>((written + done) % BoardRing::kBytes);
    const std::size_t part = std::min(count - done, BoardRing::kBytes - at);
    std::memcpy(ring.data + at, from + done, part);
    done += part;
  }
  ring.written.store(written + count, std::memory_order_release);
  return count;
}

// At most nbytes of those that are there.
inline std::size_t read_some(BoardRing& ring, char* to, std::size_t nbytes) {
  const std::uint64_t read = ring.read.load(std::memory_order_relaxed);
  const std::size_t count = std::min(nbytes, bytes_in(ring));
  for (std::size_t done = 0; done < count;) {
    const auto at = static_cast<std::size_t>((read + done) % BoardRing::kBytes);
    const std::size_t part = std::min(count - done, BoardRing::kBytes - at);
    std::memcpy(to + done, ring.data + at, part);
    done += part;
  }
  ring.read.store(read + count, std::memory_order_release);
  return count;
}

}  // namespace asyncdiff
