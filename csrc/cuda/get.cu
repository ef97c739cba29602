// Gets that do more than wait: of inline bundles, and the fused get that copies a bundle out.
#include <cstddef>
#include <cstdint>

#include "asyncdiff/channel_kernel.hpp"
#include "copy.cuh"
#include "kernels.hpp"
#include "launch.hpp"

namespace asyncdiff {

namespace {

__global__ void __launch_bounds__(kThreads) get_inline_kernel(ReceiverDevice receiver, int slot) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_launch();
  __shared__ BundleState bundle;
  if (!start(receiver, slot, false, bundle)) return;
  std::byte* to = receiver.mailbox + receiver.slot_nbytes * slot;
  const std::uint64_t step = std::uint64_t{8} * kThreads * gridDim.x;
  // The same number of turns for all lanes of a warp.
  for (std::uint64_t from = std::uint64_t{8} * kThreads * blockIdx.x; from < receiver.slot_nbytes;
       from += step) {
    const std::uint64_t at = from + std::uint64_t{8} * threadIdx.x;
    const bool wanted = at < receiver.slot_nbytes;
    std::uint64_t value;
    if (!read_inline(receiver, slot, bundle.epoch, wanted, at, value)) break;
    if (wanted) *reinterpret_cast<std::uint64_t*>(to + at) = value;
  }
  finish(receiver, false, bundle);
}

__device__ void unpack_tile_inline(const ReceiverDevice& receiver, const Tile& tile, int slot,
                                   std::uint64_t epoch) {
  const Piece& piece = tile.piece;
  const bool aligned = reinterpret_cast<std::uintptr_t>(piece.memory) % 8 == 0;
  for (std::uint64_t first = tile.from; first < tile.to; first += kThreads * 8) {
    const std::uint64_t i = first + threadIdx.x * 8;
    std::uint64_t value;
    if (!read_inline(receiver, slot, epoch, i < tile.to, piece.offset + i, value)) return;
    if (i >= tile.to) continue;
    if (aligned && i + 8 <= tile.to) {
      *reinterpret_cast<std::uint64_t*>(piece.memory + i) = value;
    } else {
      for (int b = 0; b < 8 && i + b < tile.to; ++b) {
        piece.memory[i + b] = static_cast<std::byte>(value >> (8 * b));
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack_kernel(ReceiverDevice receiver, const __grid_constant__ Unpack unpack, int slot) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_launch();
  __shared__ BundleState bundle;
  if (!start(receiver, slot, true, bundle)) return;
  const bool inlined = receiver.protocol == Protocol::kInline;
  if (!inlined) {
    // Every block waits for all flags: whether a put by kernel or copies filled the slot, and how
    // the sender dealt it out, does not matter here.
    bool good = true;
    if (static_cast<int>(threadIdx.x) < receiver.flags) {
      good = wait_for_flag(receiver, slot, bundle.epoch, static_cast<int>(threadIdx.x));
    }
    if (__syncthreads_and(good) == 0) return;  // aborted: nothing counts until the next reset
  }
  const std::byte* source = receiver.source + receiver.slot_nbytes * slot;
  TileScheduler tiles(unpack.pieces, unpack.count,
                      inlined ? kInlineShift : shift_of(receiver.slot_nbytes), blockIdx.x,
                      gridDim.x);
  for (Tile tile; tiles.next(tile);) {
    if (inlined) {
      unpack_tile_inline(receiver, tile, slot, bundle.epoch);
      continue;
    }
    std::byte* to = tile.piece.memory;
    copy_part(source + tile.piece.offset, to, tile.from, tile.to, [&](std::uint64_t i, auto word) {
      *reinterpret_cast<decltype(word)*>(to + i) = word;
    });
  }
  finish(receiver, true, bundle);
}

}  // namespace

void launch_get_inline(const ReceiverDevice& receiver, int slot, Launch how, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(receiver.flags);
  launch<get_inline_kernel>(how, {blocks, kThreads}, stream, "launching get", receiver, slot);
}

void launch_unpack(const ReceiverDevice& receiver, const Unpack& unpack, int slot, Launch how,
                   cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(receiver.flags);
  launch<unpack_kernel>(how, {blocks, kThreads}, stream, "launching unpack", receiver, unpack,
                        slot);
}

void preload_get() {
  preload<get_inline_kernel>();
  preload<unpack_kernel>();
}

}  // namespace asyncdiff
