// How many blocks move a bundle.
#pragma once

#include <algorithm>
#include <cstddef>

#include "asyncdiff/channel_device.hpp"

namespace asyncdiff {

constexpr int kFewFlags = 16;         // of a small bundle
constexpr unsigned kSmallShift = 12;  // log2 of the bytes for which it has one

// Blocks of a fused put: few, because each takes a multiprocessor from whoever computes beside it.
// Between two H200s 16 of them carry 64 KB as fast as 8 or faster, and 32 take 0.2 us longer.
// `few`: where more than kFewFlags would be in each other's way.
inline int flags_for(std::size_t nbytes, bool few) {
  const auto blocks = [nbytes](unsigned shift) {
    const std::size_t each = std::size_t{1} << shift;
    return static_cast<int>(std::clamp<std::size_t>((nbytes + each - 1) / each, 1, kMaxFlags));
  };
  const int flags = blocks(kSmallShift);
  if (flags <= kFewFlags) return flags;
  return few ? kFewFlags : blocks(kSmallShift + 1);
}

}  // namespace asyncdiff
