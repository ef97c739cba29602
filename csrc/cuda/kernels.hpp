// Launchers of the signal kernels. Each enqueues one kernel of one thread on the current device.
#pragma once

#include <cuda_runtime_api.h>

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
// Writes seed + i to memory[i], which may lie on another device.
void launch_fill(std::uint32_t* memory, std::uint32_t count, std::uint32_t seed,
                 cudaStream_t stream);

// Loads all kernels onto the current device. Loading one lazily may wait for running kernels,
// which may be waiting for the one to be loaded.
void preload_kernels();

}  // namespace asyncdiff
