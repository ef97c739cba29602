// A piece of memory that others may look at: it lives as long as somebody holds it.
#pragma once

#include <cstddef>
#include <memory>

#include "asyncdiff/export.hpp"

namespace asyncdiff {

struct Buffer {
  static constexpr int kHost = -1;

  std::shared_ptr<void> owner;  // keeps the memory
  std::byte* data = nullptr;
  std::size_t nbytes = 0;
  int device = kHost;  // CUDA device index, or kHost
};

// Page-aligned zeroed host memory.
ASYNCDIFF_EXPORT Buffer allocate_host(std::size_t nbytes);

}  // namespace asyncdiff
