// How a block copies a part of a tensor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace asyncdiff {

constexpr int kThreads = 512;                        // of a block that moves data
constexpr std::uint64_t kInlineTile = kThreads * 8;  // bytes that a block moves inline at a time

constexpr int kWordsAtOnce = 4;                      // that a thread has under way

// The same of flagged bundles. Small ones are to occupy several blocks; in large ones a thread is
// to have as many loads under way as it can.
__device__ inline std::uint64_t tile_of(std::uint64_t slot_nbytes) {
  return slot_nbytes <= (std::uint64_t{1} << 18) ? 16384 : 32768;
}

// Loads each word once and gives it to store(offset, word). Several loads are under way at a time:
// what waits for memory is what limits a few blocks. Before it stores, may_store() is asked, by all
// threads of the block together; where it says no, this ends.
template <class Word, class Ask, class Store>
__device__ void copy_words(const std::byte* source, std::uint64_t from, std::uint64_t to,
                           Ask may_store, Store store) {
  constexpr std::uint64_t kStep = kThreads * sizeof(Word);
  for (std::uint64_t first = from; first < to; first += kWordsAtOnce * kStep) {
    const std::uint64_t i = first + threadIdx.x * sizeof(Word);
    Word words[kWordsAtOnce];
#pragma unroll
    for (int n = 0; n < kWordsAtOnce; ++n) {
      if (i + n * kStep < to) words[n] = *reinterpret_cast<const Word*>(source + i + n * kStep);
    }
    if (!may_store()) return;
#pragma unroll
    for (int n = 0; n < kWordsAtOnce; ++n) {
      if (i + n * kStep < to) store(i + n * kStep, words[n]);
    }
  }
}

// The bytes [from, to); `from` is a multiple of 16. `address` is the less aligned one of both
// ends; slots are always aligned.
template <class Ask, class Store>
__device__ void copy_part(const std::byte* source, const std::byte* address, std::uint64_t from,
                          std::uint64_t to, Ask may_store, Store store) {
  const auto alignment = reinterpret_cast<std::uintptr_t>(address);
  std::uint64_t middle = from;
  if (alignment % sizeof(uint4) == 0) {
    middle = to / sizeof(uint4) * sizeof(uint4);
    copy_words<uint4>(source, from, middle, may_store, store);
  } else if (alignment % sizeof(std::uint32_t) == 0) {
    middle = to / sizeof(std::uint32_t) * sizeof(std::uint32_t);
    copy_words<std::uint32_t>(source, from, middle, may_store, store);
  }
  copy_words<std::uint8_t>(source, middle, to, may_store, store);
}

// Deals the parts of all pieces out to `blocks` blocks in turn, and calls part(piece, from, to) for
// those of this block.
template <class Part>
__device__ void deal(const Piece* pieces, int count, std::uint64_t tile_nbytes, unsigned block,
                     unsigned blocks, Part part) {
  unsigned next = 0;  // the block that gets the next tile
  for (int p = 0; p < count; ++p) {
    const std::uint64_t nbytes = pieces[p].nbytes;
    const auto tiles = static_cast<unsigned>((nbytes + tile_nbytes - 1) / tile_nbytes);
    for (unsigned tile = (block + blocks - next) % blocks; tile < tiles; tile += blocks) {
      const std::uint64_t from = tile * tile_nbytes;
      part(pieces[p], from, from + tile_nbytes < nbytes ? from + tile_nbytes : nbytes);
    }
    next = (next + tiles) % blocks;
  }
}

}  // namespace asyncdiff
