// Device memory, pinned host memory, and lines of them.
#pragma once

#include <cstddef>

#include "asyncdiff/memory.hpp"
#include "asyncdiff/processes.hpp"

namespace asyncdiff {

// Zeroed device memory. Throws CudaError, naming the size, where there is not enough.
Buffer allocate_device(int device, std::size_t nbytes);

// Zeroed host memory that every device can read and write at the same address. Pinned with `device`
// current: with another one, that one would get a context.
Buffer allocate_pinned(int device, std::size_t nbytes);

// The same, seen by all processes; made by process `creator`. Collective; `device` is this
// process's own.
Buffer share_pinned(const Processes& processes, int creator, int device, std::size_t nbytes);

// Sets the first nbytes to zero, or to another byte, and waits until they are.
void clear(const Buffer& buffer, std::size_t nbytes, unsigned char value = 0);

// Deals out 128-byte lines of a piece of memory, in order. Processes that take the same numbers in
// the same order get the same lines, wherever each of them sees the memory.
class Lines {
 public:
  static constexpr std::size_t kLine = 128;
  // Memory that processes share comes in pieces of this size anyway.
  static constexpr std::size_t kBytes = std::size_t{2} << 20;

  // The offset in bytes of the first of `count` lines. Throws Error when all are taken.
  std::size_t take(std::size_t count = 1);
  std::size_t used() const { return used_; }

 private:
  std::size_t used_ = 0;
};

}  // namespace asyncdiff
