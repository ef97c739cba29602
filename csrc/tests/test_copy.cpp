// How blocks share a bundle and copy their parts, thread by thread on the CPU: every byte of every
// tensor is copied once, to its place, whatever sizes and alignments are.
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "check.hpp"
#include "device_on_cpu.hpp"
// After it.
#include "../cuda/copy.cuh"

using namespace asyncdiff;

namespace {

constexpr std::uint64_t kAlignment = 256;

struct Bundle {
  std::vector<std::vector<std::byte>> memory;
  std::vector<Piece> pieces;
  std::uint64_t nbytes = 0;

  explicit Bundle(std::mt19937& random) {
    const auto below = [&](unsigned n) { return static_cast<unsigned>(random() % n); };
    for (unsigned i = below(6) + 1; i > 0; --i) {
      const std::uint64_t size = 1 + below(below(4) == 0 ? 600000 : 20000);
      const unsigned shift = below(3) == 0 ? below(17) : 0;
      memory.emplace_back(size + 32);
      for (auto& b : memory.back()) b = static_cast<std::byte>(random());
      const auto at = reinterpret_cast<std::uintptr_t>(memory.back().data());
      pieces.push_back({memory.back().data() + (16 - at % 16) + shift % 16, nbytes, size});
      nbytes += (size + kAlignment - 1) / kAlignment * kAlignment;
    }
  }
};

// What a launch of so many blocks does.
template <class Copy>
void run(const Bundle& bundle, unsigned blocks, Copy copy) {
  for (unsigned block = 0; block < blocks; ++block) {
    for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) {
      TileScheduler scheduler(bundle.pieces.data(), static_cast<int>(bundle.pieces.size()),
                              shift_of(bundle.nbytes), block, blocks);
      for (Tile tile; scheduler.next(tile);) copy(tile);
    }
  }
}

void every_byte_once(std::mt19937& random) {
  const Bundle bundle(random);
  // Room before and behind the slot shows what is written beside it.
  std::vector<std::byte> slot(bundle.nbytes + 64);
  std::vector<std::uint8_t> writes(slot.size());
  std::byte* begin = slot.data() + (16 - reinterpret_cast<std::uintptr_t>(slot.data()) % 16);
  run(bundle, 1 + static_cast<unsigned>(random() % kMaxFlags), [&](const Tile& tile) {
    const Piece& piece = tile.piece;
    copy_part(piece.memory, piece.memory, tile.from, tile.to, [&](std::uint64_t i, auto word) {
      std::byte* to = begin + piece.offset + i;
      *reinterpret_cast<decltype(word)*>(to) = word;
      for (std::size_t b = 0; b < sizeof word; ++b)
        ++writes[static_cast<std::size_t>(to - slot.data()) + b];
    });
  });
  std::vector<std::uint8_t> expected(slot.size());
  for (const Piece& piece : bundle.pieces) {
    for (std::uint64_t b = 0; b < piece.nbytes; ++b) {
      CHECK(begin[piece.offset + b] == piece.memory[b]);
      expected[static_cast<std::size_t>(begin - slot.data()) + piece.offset + b] = 1;
    }
  }
  CHECK(writes == expected);
}

void small_bundles_have_a_block_for_each_tile() {
  for (std::uint64_t nbytes = 16; nbytes <= std::uint64_t{kMaxFlags} << kSmallShift; nbytes += 16) {
    const auto blocks = static_cast<std::uint64_t>(flags_for(nbytes, kMaxFlags));
    CHECK(blocks << shift_of(nbytes) >= nbytes);
    CHECK((blocks - 1) << shift_of(nbytes) < nbytes);
  }
  CHECK(flags_for(0, kMaxFlags) == 1);
  CHECK(flags_for(std::size_t{1} << 40, kInlineFlags) == kInlineFlags);
  CHECK(flags_for(std::size_t{1} << 40, kMaxFlags) == kMaxFlags);
}

void tiles_are_shared_evenly() {
  Piece piece{nullptr, 0, 1 << 19};
  unsigned tiles = 0;
  for (unsigned block = 0; block < kMaxFlags; ++block) {
    TileScheduler scheduler(&piece, 1, shift_of(piece.nbytes), block, kMaxFlags);
    unsigned mine = 0;
    for (Tile tile; scheduler.next(tile);) ++mine;
    CHECK(mine == 1);
    tiles += mine;
  }
  CHECK(tiles << shift_of(piece.nbytes) == piece.nbytes);
  // Three tensors of five tiles each: the first block that gets one more is the next one's.
  const std::vector<Piece> three(3, {nullptr, 0, 5 << 13});
  for (unsigned block = 0; block < 4; ++block) {
    TileScheduler scheduler(three.data(), 3, 13, block, 4);
    unsigned mine = 0;
    for (Tile tile; scheduler.next(tile);) ++mine;
    CHECK(mine == (block < 3 ? 4 : 3));
  }
  TileScheduler none(nullptr, 0, 13, 0, 1);
  Tile tile;
  CHECK(!none.next(tile));
}

}  // namespace

int main() {
  std::mt19937 random(7);
  for (int i = 0; i < 200; ++i) every_byte_once(random);
  small_bundles_have_a_block_for_each_tile();
  tiles_are_shared_evenly();
}
