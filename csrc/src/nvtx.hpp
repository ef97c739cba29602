// Ranges in a profiler's timeline, in the domain "asyncdiff". Free where no tool listens.
#pragma once

#include <string>

#include "asyncdiff/channel.hpp"
#include "asyncdiff/export.hpp"

namespace asyncdiff::nvtx {

// Whether a tool listens. False in builds without NVTX headers.
ASYNCDIFF_EXPORT bool listening();

// Nested ranges of the calling thread.
ASYNCDIFF_EXPORT void push(const char* message);
ASYNCDIFF_EXPORT void pop();

// "put 'hidden states' rank 0 slot 1 60461056 bytes", for the life of the object.
class ASYNCDIFF_EXPORT Range {
 public:
  Range(const char* operation, const Channel& channel, int rank, int slot) : open_(listening()) {
    if (open_) open(operation, channel, rank, slot);
  }
  ~Range() {
    if (open_) pop();
  }
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;

 private:
  static void open(const char* operation, const Channel& channel, int rank, int slot);

  bool open_;
};

}  // namespace asyncdiff::nvtx
