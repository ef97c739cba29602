// Lines of a piece of memory: each holds a word, or a few, that one end writes and others watch.
#pragma once

#include <cstddef>
#include <map>

#include "asyncdiff/export.hpp"

namespace asyncdiff {

// Deals out 128-byte lines.
class ASYNCDIFF_EXPORT FlagPool {
 public:
  static constexpr std::size_t kLine = 128;
  // Memory that processes share comes in pieces of this size anyway.
  static constexpr std::size_t kBytes = std::size_t{2} << 20;

  explicit FlagPool(std::size_t nbytes = kBytes) : nbytes_(nbytes) {}

  // The offset in bytes of the first of `count` lines. Throws Error when all are taken.
  std::size_t take(std::size_t count = 1);
  // Takes back what was taken, for others: the caller has cleared it.
  void give_back(std::size_t first, std::size_t count);
  // Bytes from the start in which all lines lie that were ever taken.
  std::size_t used() const { return used_; }

 private:
  std::size_t nbytes_;
  std::size_t used_ = 0;
  std::map<std::size_t, std::size_t> free_;  // bytes below used_, by offset; no two touch
};

}  // namespace asyncdiff
