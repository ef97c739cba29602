// How a block copies a part of a tensor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace asyncdiff {

constexpr int kThreads = 512;           // of a block that moves data
constexpr std::uint64_t kTile = 16384;  // bytes that a block copies at a time

// Loads each word once and gives it to store(offset, word).
template <class Word, class Store>
__device__ void copy_words(const std::byte* source, std::uint64_t from, std::uint64_t to,
                           Store store) {
  for (std::uint64_t i = from + threadIdx.x * sizeof(Word); i < to; i += kThreads * sizeof(Word)) {
    store(i, *reinterpret_cast<const Word*>(source + i));
  }
}

// The bytes [from, to); `from` is a multiple of kTile. `address` is the less aligned one of both
// ends; slots are always aligned.
template <class Store>
__device__ void copy_part(const std::byte* source, const std::byte* address, std::uint64_t from,
                          std::uint64_t to, Store store) {
  const auto alignment = reinterpret_cast<std::uintptr_t>(address);
  std::uint64_t middle = from;
  if (alignment % sizeof(uint4) == 0) {
    middle = to / sizeof(uint4) * sizeof(uint4);
    copy_words<uint4>(source, from, middle, store);
  } else if (alignment % sizeof(std::uint32_t) == 0) {
    middle = to / sizeof(std::uint32_t) * sizeof(std::uint32_t);
    copy_words<std::uint32_t>(source, from, middle, store);
  }
  copy_words<std::uint8_t>(source, middle, to, store);
}

// Deals the parts of all pieces out to `blocks` blocks in turn, and calls part(piece, from, to) for
// those of this block. Sender and receiver deal alike, so that what block b reads is what the
// sender's block b wrote.
template <class Part>
__device__ void deal(const Piece* pieces, int count, std::uint64_t tile_nbytes, unsigned block,
                     unsigned blocks, Part part) {
  std::uint64_t tile = 0;
  for (int p = 0; p < count; ++p) {
    const std::uint64_t nbytes = pieces[p].nbytes;
    for (std::uint64_t from = 0; from < nbytes; from += tile_nbytes, ++tile) {
      if (tile % blocks != block) continue;
      part(pieces[p], from, from + tile_nbytes < nbytes ? from + tile_nbytes : nbytes);
    }
  }
}

}  // namespace asyncdiff
