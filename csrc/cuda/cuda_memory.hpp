// Device memory, pinned host memory, and the control words of channels.
#pragma once

#include <cstddef>
#include <map>
#include <vector>

#include "asyncdiff/memory.hpp"

namespace asyncdiff {

// Zeroed device memory. Throws CudaError, naming the size, where there is not enough.
Buffer allocate_device(int device, std::size_t nbytes);

// Zeroed host memory that every device can read and write at the same address.
Buffer allocate_pinned(std::size_t nbytes);

// Sets memory to zero and waits until it is.
void clear(const Buffer& buffer);

// Hands out zeroed 128-byte lines on devices and in pinned host memory (Buffer::kHost). A line
// belongs to the fabric until it ends. Not thread-safe.
class ControlLines {
 public:
  static constexpr std::size_t kLine = 128;

  // The first of `count` lines that follow each other.
  void* take(int device, std::size_t count = 1);
  // Sets all lines to zero. Nothing may be in flight.
  void clear_all();
  void release_all();

 private:
  static constexpr std::size_t kLinesPerChunk = 512;

  struct Place {
    std::vector<Buffer> chunks;
    std::size_t used = kLinesPerChunk;  // of the last chunk
  };
  std::map<int, Place> places_;
};

}  // namespace asyncdiff
