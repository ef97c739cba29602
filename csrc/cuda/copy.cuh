// How a block copies a part of a tensor, and which parts. Also compiled for the CPU, by a test.
#pragma once

#include <cstddef>
#include <cstdint>

#include "asyncdiff/channel_device.hpp"
#include "blocks.hpp"
#include "piece.hpp"

namespace asyncdiff {

constexpr int kThreads = 512;          // of a block that moves data
constexpr unsigned kInlineShift = 12;  // log2 of the bytes that a block moves inline at a time
static_assert(1 << kInlineShift == kThreads * 8, "a word for each thread");

constexpr unsigned kMaxShift = 15;  // log2 of the bytes of a tile
constexpr int kWordsAtOnce = 4;     // that a thread has under way

// The same of flagged bundles: as long as there are blocks enough, each gets one tile, and the
// larger ones are as much as its threads have under way. More than kFewFlags blocks are worth it
// only for tiles that keep all of their threads busy.
__device__ inline unsigned shift_of(std::uint64_t slot_nbytes) {
  if (slot_nbytes <= static_cast<std::uint64_t>(kFewFlags) << kSmallShift) return kSmallShift;
  unsigned shift = kSmallShift + 1;
  while (shift < kMaxShift && slot_nbytes > static_cast<std::uint64_t>(kMaxFlags) << shift) ++shift;
  return shift;
}

// Words of a tile that the threads of a block have loaded, and not stored yet.
template <class Word>
struct Loaded {
  static constexpr std::uint64_t kStep = kThreads * sizeof(Word);

  Word words[kWordsAtOnce];

  __device__ void load(const std::byte* source, std::uint64_t first, std::uint64_t to) {
#pragma unroll
    for (int n = 0; n < kWordsAtOnce; ++n) {
      if (first + n * kStep < to) {
        words[n] = *reinterpret_cast<const Word*>(source + first + n * kStep);
      }
    }
  }
  // store(offset, word)
  template <class Store>
  __device__ void store(std::uint64_t first, std::uint64_t to, Store store) const {
#pragma unroll
    for (int n = 0; n < kWordsAtOnce; ++n) {
      if (first + n * kStep < to) store(first + n * kStep, words[n]);
    }
  }
};

// Loads each word once and gives it to store(offset, word). Several loads are under way at a time:
// what waits for memory is what limits a few blocks.
template <class Word, class Store>
__device__ void copy_words(const std::byte* source, std::uint64_t from, std::uint64_t to,
                           Store store) {
  for (std::uint64_t i = from + threadIdx.x * sizeof(Word); i < to;
       i += kWordsAtOnce * Loaded<Word>::kStep) {
    Loaded<Word> loaded;
    loaded.load(source, i, to);
    loaded.store(i, to, store);
  }
}

// The bytes [from, to); `from` is a multiple of 16. `address` is the less aligned one of both
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

// The bytes [from, to) of a piece.
struct Tile {
  Piece piece;
  std::uint64_t from;
  std::uint64_t to;
};

// Deals the tiles of all pieces, of 1 << shift bytes each, out to `blocks` blocks in turn.
class Deal {
 public:
  __device__ Deal(const Piece* pieces, int count, unsigned shift, unsigned block, unsigned blocks)
      : piece_(pieces), end_(pieces + count), shift_(shift), block_(block), blocks_(blocks) {
    begin(0);
  }

  // This block's next tile, or false.
  __device__ bool next(Tile& tile) {
    while (piece_ != end_) {
      if (at_ < tiles_) {
        const std::uint64_t from = static_cast<std::uint64_t>(at_) << shift_;
        const std::uint64_t to = from + (std::uint64_t{1} << shift_);
        const Piece piece = *piece_;
        tile = {piece, from, to < piece.nbytes ? to : piece.nbytes};
        at_ += blocks_;
        return true;
      }
      ++piece_;
      if (piece_ != end_) begin((first_ + tiles_) % blocks_);
    }
    return false;
  }

 private:
  // Of the current piece; block `first` gets its first tile.
  __device__ void begin(unsigned first) {
    if (piece_ == end_) return;
    first_ = first;
    tiles_ = static_cast<unsigned>((piece_->nbytes + (std::uint64_t{1} << shift_) - 1) >> shift_);
    at_ = block_ >= first ? block_ - first : block_ + blocks_ - first;
  }

  const Piece* piece_;
  const Piece* end_;
  unsigned shift_, block_, blocks_;
  unsigned first_ = 0, tiles_ = 0, at_ = 0;
};

}  // namespace asyncdiff
