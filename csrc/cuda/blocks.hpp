// How many blocks move a bundle.
#pragma once

#include <algorithm>
#include <cstddef>

#include "asyncdiff/channel_device.hpp"

namespace asyncdiff {

// A small bundle has a block for each 1 << kSmallShift bytes, up to kFewFlags blocks; where ranks
// share a device, larger ones have no more than that either.
constexpr unsigned kSmallShift = 12;
constexpr int kFewFlags = 16;
// At most so many blocks move an inline bundle: all of them look at its words again and again, and
// more keep the words from arriving. Between two H200s 64 KB took 160 us at times with 16, and
// 256 KB 286 us with 32.
constexpr int kInlineFlags = 8;

// Blocks of a fused put, at most so many: few, because each takes a multiprocessor from whoever
// computes beside it. Between two H200s 16 of them carry 64 KB as fast as 8 or faster, and 32 take
// 0.2 us longer.
inline int flags_for(std::size_t nbytes, int most) {
  const auto blocks = [nbytes](unsigned shift) {
    const std::size_t each = std::size_t{1} << shift;
    return static_cast<int>(std::clamp<std::size_t>((nbytes + each - 1) / each, 1, kMaxFlags));
  };
  const int flags = blocks(kSmallShift);
  if (flags <= kFewFlags || most <= kFewFlags) return std::min(flags, most);
  return blocks(kSmallShift + 1);
}

}  // namespace asyncdiff
