// A tensor of a bundle and where it lies outside of the slot.
#pragma once

#include <cstddef>
#include <cstdint>

namespace asyncdiff {

struct Piece {
  std::byte* memory;
  std::uint64_t offset;  // in the slot
  std::uint64_t nbytes;
};

}  // namespace asyncdiff
