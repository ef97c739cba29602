// A tensor of a bundle: where it lies, and its place in the slot.
#pragma once

#include <cstddef>
#include <cstdint>

namespace asyncdiff {

struct Piece {
  const std::byte* memory;
  std::uint64_t offset;  // in the slot
  std::uint64_t nbytes;
};

}  // namespace asyncdiff
