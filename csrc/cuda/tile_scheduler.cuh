// Which parts of a bundle each block moves. Also compiled for the CPU, by a test.
#pragma once

#include <cstdint>

#include "asyncdiff/channel_device.hpp"
#include "blocks.hpp"
#include "piece.hpp"

namespace asyncdiff {

constexpr int kThreads = 512;          // of a block that moves data
constexpr unsigned kInlineShift = 12;  // log2 of the bytes that a block moves inline at a time
static_assert(1 << kInlineShift == kThreads * 8, "a word for each thread");
constexpr unsigned kMaxShift = 15;  // log2 of the bytes of a tile

// The log2 of the bytes of a tile of a flagged bundle. As long as there are blocks enough, each
// gets one tile, and the larger ones are as much as its threads have under way. More than kFewFlags
// blocks are worth it only for tiles that keep all of their threads busy.
__device__ inline unsigned shift_of(std::uint64_t slot_nbytes) {
  if (slot_nbytes <= static_cast<std::uint64_t>(kFewFlags) << kSmallShift) return kSmallShift;
  unsigned shift = kSmallShift + 1;
  while (shift < kMaxShift && slot_nbytes > static_cast<std::uint64_t>(kMaxFlags) << shift) ++shift;
  return shift;
}

// The bytes [from, to) of a piece.
struct Tile {
  Piece piece;
  std::uint64_t from;
  std::uint64_t to;
};

// Deals the tiles of all pieces, of 1 << shift bytes each, out to `blocks` blocks in turn.
class TileScheduler {
 public:
  __device__ TileScheduler(const Piece* pieces, int count, unsigned shift, unsigned block,
                           unsigned blocks)
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
