// Launchers of the kernels. Each validates nothing, enqueues one kernel on the current device, and
// throws CudaError where that fails.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "asyncdiff/channel_device.hpp"
#include "launch.hpp"
#include "piece.hpp"

namespace asyncdiff {

// signals.cu: one warp each; copies between them move the data.

// Waits until every receiver has released the slot.
void launch_begin(const SenderDevice& sender, int slot, cudaStream_t stream);
// Tells every receiver that the bundle is there.
void launch_commit(const SenderDevice& sender, int slot, cudaStream_t stream);
// Waits for the next bundle. Flagged channels only.
void launch_get(const ReceiverDevice& receiver, int slot, Launch how, cudaStream_t stream);
// Gives the slot back.
void launch_release(const ReceiverDevice& receiver, int slot, Launch how, cudaStream_t stream);

// put.cu: begin, copy, commit in one launch.

// Bundles of several channels of one sender. Kernel parameters, so both sizes are bounded.
template <int kChannels, int kPieces>
struct Puts {
  static constexpr int kMaxChannels = kChannels;
  static constexpr int kMaxPieces = kPieces;

  int count = 0;
  SenderDevice sender[kChannels];
  int slot[kChannels];
  int first_piece[kChannels + 1] = {};
  int first_block[kChannels + 1] = {};
  Piece pieces[kPieces];
};
using SmallPut = Puts<1, 8>;    // the fewer bytes, the faster the launch
using OnePut = Puts<1, 96>;     // up to 4 KiB
using ManyPuts = Puts<8, 320>;  // up to 32 KiB
void launch_put(const SmallPut& put, Launch how, cudaStream_t stream);
void launch_put(const OnePut& put, Launch how, cudaStream_t stream);
void launch_put(const ManyPuts& puts, Launch how, cudaStream_t stream);
// One piece of a bundle that has begun. Inline channels only: others are copied by copy engines.
void launch_push_inline(const SenderDevice& sender, const Piece& piece, int slot,
                        cudaStream_t stream);

// get.cu: gets of more than a wait.

// Waits for the next bundle of an inline channel and leaves it in the mailbox.
void launch_get_inline(const ReceiverDevice& receiver, int slot, Launch how, cudaStream_t stream);
// Get, copy all pieces out, release, in one launch.
struct Unpack {
  static constexpr int kMaxPieces = 96;

  int count = 0;
  Piece pieces[kMaxPieces];
};
void launch_unpack(const ReceiverDevice& receiver, const Unpack& unpack, int slot, Launch how,
                   cudaStream_t stream);

// fill.cu

// Writes seed + i to memory[i], which may lie on another device.
void launch_fill(std::uint32_t* memory, std::uint32_t count, std::uint32_t seed,
                 cudaStream_t stream);

// Loads all kernels onto the current device. Loading one lazily may wait for running kernels,
// which may be waiting for the one to be loaded.
void preload_kernels();
void preload_signals();
void preload_put();
void preload_get();
void preload_fill();
void preload_memsets();

}  // namespace asyncdiff
