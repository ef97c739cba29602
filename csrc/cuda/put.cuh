// The kernels of put and push: each word is loaded once and stored to all receivers. Blocks do not
// wait for each other. Also compiled for the CPU, by a test.
#pragma once

#include <cstddef>
#include <cstdint>

#include "asyncdiff/channel_sender.hpp"
#include "copy.cuh"
#include "puts.hpp"

namespace asyncdiff {

// Starts a fused put: false in all threads where it must not be. Waits for the slot.
__device__ inline bool start_put(const SenderDevice& sender, int slot, BundleState& bundle) {
  if (threadIdx.x < kWarp) {
    const SenderCounters& counters = *sender.counters;
    // All blocks read them before the last of them, which is the one that changes them, is done.
    const std::uint64_t begun = counters.begun;
    const std::uint64_t committed = counters.committed;
    const Credit credit(sender);
    bool good = true;
    if (threadIdx.x == 0) {
      good =
          in_turn(sender.context, Operation::kBegin, slot, begun, begun == committed, sender.slots);
    }
    good = __all_sync(~0u, good) != 0 && credit.wait(sender, begun + 1, slot);
    if (threadIdx.x == 0) bundle = {begun + 1, good};
  }
  __syncthreads();
  return bundle.go;
}

// Starts a push: false in all threads where no bundle has begun in this slot, as after a begin that
// failed. The slot may still be read then.
__device__ inline bool start_push(const SenderDevice& sender, int slot, BundleState& bundle) {
  if (threadIdx.x == 0) {
    const SenderCounters& counters = *sender.counters;
    const std::uint64_t begun = counters.begun;
    const std::uint64_t committed = counters.committed;
    bundle = {begun, in_turn(sender.context, Operation::kPush, slot, committed,
                             begun == committed + 1, sender.slots)};
  }
  __syncthreads();
  return bundle.go;
}

// Up to 8 bytes; those from `nbytes` on are zero.
__device__ inline std::uint64_t load_padded(const std::byte* source, std::uint64_t at,
                                            std::uint64_t nbytes) {
  if (at + 8 <= nbytes && reinterpret_cast<std::uintptr_t>(source) % 8 == 0) {
    return *reinterpret_cast<const std::uint64_t*>(source + at);
  }
  std::uint64_t value = 0;
  for (int b = 0; b < 8 && at + b < nbytes; ++b) {
    value |= static_cast<std::uint64_t>(source[at + b]) << (8 * b);
  }
  return value;
}

// The word of an inline tile that falls to this thread.
__device__ inline std::uint64_t word_of(const Tile& tile) {
  return load_padded(tile.piece.memory, tile.from + threadIdx.x * 8, tile.piece.nbytes);
}

// Stores it: up to the next multiple of kAlignment, because the receiver looks at all words of the
// slot.
__device__ inline void put_word(const SenderDevice& sender, const Tile& tile, int slot,
                                std::uint64_t epoch, std::uint64_t word) {
  constexpr std::uint64_t kAlignment = 256;  // of Layout
  const std::uint64_t end = (tile.to + kAlignment - 1) / kAlignment * kAlignment;
  const std::uint64_t i = tile.from + threadIdx.x * 8;
  if (i < end) write_inline(sender, slot, epoch, tile.piece.offset + i, word);
}

// In both protocols, the words of the first tile are on their way from memory together with the
// counters and credits that say whether they may be stored: start() says that, in all threads.
// `more`: whether there is such a tile.

template <class Start>
__device__ inline void put_inline(const SenderDevice& sender, TileScheduler& tiles, Tile& tile,
                                  bool more, int slot, BundleState& bundle, Start start) {
  std::uint64_t word = more ? word_of(tile) : 0;
  if (!start()) return;
  while (more) {
    put_word(sender, tile, slot, bundle.epoch, word);
    more = tiles.next(tile);
    if (more) word = word_of(tile);
  }
}

template <class Start>
__device__ inline void put_flagged(const SenderDevice& sender, TileScheduler& tiles, Tile& tile,
                                   bool more, int slot, BundleState& bundle, Start start) {
  const std::uint64_t begin = sender.slot_nbytes * slot;
  const auto store = [&](std::uint64_t i, auto word) {
    for (int t = 0; t < sender.targets; ++t) {
      std::byte* to = sender.target[t] + begin + tile.piece.offset + i;
      *reinterpret_cast<decltype(word)*>(to) = word;
    }
  };
  static_assert(Loaded<uint4>::kStep * kWordsAtOnce >> kMaxShift == 1, "a tile at once");
  const std::uint64_t mine = tile.from + threadIdx.x * sizeof(uint4);
  std::uint64_t middle = tile.from;
  Loaded<uint4> loaded;
  if (more && reinterpret_cast<std::uintptr_t>(tile.piece.memory) % sizeof(uint4) == 0) {
    middle = tile.to / sizeof(uint4) * sizeof(uint4);
    loaded.load(tile.piece.memory, mine, middle);
  }
  if (!start()) return;
  if (more) loaded.store(mine, middle, store);
  tile.from = middle;
  while (more) {
    copy_part(tile.piece.memory, tile.piece.memory, tile.from, tile.to, store);
    more = tiles.next(tile);
  }
}

// Moves the tiles of this block, if start() allows it.
template <class Start>
__device__ inline void put_tiles(const SenderDevice& sender, TileScheduler& tiles, Tile& tile,
                                 bool more, int slot, BundleState& bundle, Start start) {
  if (sender.protocol == Protocol::kInline) {
    put_inline(sender, tiles, tile, more, slot, bundle, start);
  } else {
    put_flagged(sender, tiles, tile, more, slot, bundle, start);
  }
}

// Begin, copy, commit. Two blocks fit on a multiprocessor: one that lies in wait leaves half of its
// registers to others.
template <class P>
__global__ void __launch_bounds__(kThreads, 2) put_kernel(const __grid_constant__ P puts) {
  int c = 0;
  while (static_cast<int>(blockIdx.x) >= puts.first_block[c + 1]) ++c;
  const SenderDevice& sender = puts.sender[c];
  const int slot = puts.slot[c];
  const unsigned block = blockIdx.x - puts.first_block[c];
  const unsigned blocks = puts.first_block[c + 1] - puts.first_block[c];
  const bool inlined = sender.protocol == Protocol::kInline;
  __shared__ BundleState bundle;
  const int first = puts.first_piece[c];
  const int count = puts.first_piece[c + 1] - first;
  const unsigned shift = inlined ? kInlineShift : shift_of(sender.slot_nbytes);
  TileScheduler tiles(puts.pieces + first, count, shift, block, blocks);
  Tile tile{};
  const bool more = tiles.next(tile);
  ptx::hold(tile.piece.memory);
  ptx::hold(tile.piece.offset);
  ptx::hold(tile.piece.nbytes);
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_launch();

  put_tiles(sender, tiles, tile, more, slot, bundle,
            [&] { return start_put(sender, slot, bundle); });
  if (!bundle.go) return;  // aborted: nothing counts until the next reset
  // Data before flag: the barrier orders the block's stores before what a thread releases.
  __syncthreads();
  if (!inlined && threadIdx.x < sender.receivers) {
    std::uint64_t* flags = sender.arrived[threadIdx.x];
    ptx::store_release_system(flags + block * kFlagStride, bundle.epoch);
  }
  if (threadIdx.x != 0) return;
  SenderCounters& counters = *sender.counters;
  if (ptx::add_one_acquire_release_device(&counters.finished) + 1 == blocks) {
    counters.finished = 0;
    counters.begun = bundle.epoch;
    counters.committed = bundle.epoch;
  }
}

// One tensor of a bundle that has begun.
__global__ void __launch_bounds__(kThreads, 2)
    push_kernel(SenderDevice sender, Piece piece, int slot) {
  __shared__ BundleState bundle;
  const bool inlined = sender.protocol == Protocol::kInline;
  TileScheduler tiles(&piece, 1, inlined ? kInlineShift : shift_of(piece.nbytes), blockIdx.x,
                      gridDim.x);
  Tile tile{};
  const bool more = tiles.next(tile);
  put_tiles(sender, tiles, tile, more, slot, bundle,
            [&] { return start_push(sender, slot, bundle); });
}

}  // namespace asyncdiff
