// Launchers of the kernels. Each enqueues one kernel on the current device. A kernel that signals
// is one warp; a fused put has a block for each of the channel's flags.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "asyncdiff/channel_device.hpp"

namespace asyncdiff {

// Waits until every receiver has released the slot.
void launch_begin(const SenderDevice& sender, int slot, cudaStream_t stream);
// Tells every receiver that the bundle is there.
void launch_commit(const SenderDevice& sender, int slot, cudaStream_t stream);
// Waits for the next bundle.
void launch_get(const ReceiverDevice& receiver, int slot, cudaStream_t stream);
// Gives the slot back.
void launch_release(const ReceiverDevice& receiver, int slot, cudaStream_t stream);
// Tensors of a fused put.
struct Piece {
  const std::byte* source;
  std::uint64_t offset;  // in the slot
  std::uint64_t nbytes;
};
struct Bundle {
  static constexpr int kMax = 96;  // with a SenderDevice they have to fit 4 KiB of parameters

  int count;
  Piece pieces[kMax];
};
// Begin, copy all pieces to all targets, commit.
void launch_put(const SenderDevice& sender, const Bundle& bundle, int slot, cudaStream_t stream);
// Writes seed + i to memory[i], which may lie on another device.
void launch_fill(std::uint32_t* memory, std::uint32_t count, std::uint32_t seed,
                 cudaStream_t stream);

// Loads all kernels onto the current device. Loading one lazily may wait for running kernels,
// which may be waiting for the one to be loaded.
void preload_kernels();

}  // namespace asyncdiff
