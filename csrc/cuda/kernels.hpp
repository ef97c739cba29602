// Launchers of the kernels. Each validates nothing, enqueues one kernel on the current device, and
// throws CudaError where that fails.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "asyncdiff/channel_device.hpp"
#include "launch.hpp"
#include "nccl_link.hpp"
#include "piece.hpp"
#include "puts.hpp"
#include "simulated_link.hpp"

namespace asyncdiff {

// signals.cu: one warp each; pushes between them move the data.

// Waits until every receiver has released the slot.
void launch_begin(const SenderDevice& sender, int slot, cudaStream_t stream);
// Tells every receiver that the bundle is there.
void launch_commit(const SenderDevice& sender, int slot, cudaStream_t stream);
// Waits for the next bundle. Flagged channels only.
void launch_get(const ReceiverDevice& receiver, int slot, Launch how, cudaStream_t stream);
// Gives the slot back.
void launch_release(const ReceiverDevice& receiver, int slot, Launch how, cudaStream_t stream);

// put.cu: begin, copy, commit in one launch; or one tensor of a bundle that has begun. Not of mode
// copy.

void launch_put(const SmallPut& put, Launch how, cudaStream_t stream);
void launch_put(const OnePut& put, Launch how, cudaStream_t stream);
void launch_put(const ManyPuts& puts, Launch how, cudaStream_t stream);
void launch_push(const SenderDevice& sender, const Piece& piece, int slot, cudaStream_t stream);

// get.cu

// Waits for the next bundle of an inline channel and leaves it in the mailbox.
void launch_get_inline(const ReceiverDevice& receiver, int slot, Launch how, cudaStream_t stream);

// fill.cu

// Writes seed + i to memory[i], which may lie on another device.
void launch_fill(std::uint32_t* memory, std::uint32_t count, std::uint32_t seed,
                 cudaStream_t stream);

// nccl_signals.cu

// Sets words after what comes before in the stream.
void launch_publish(const Publication& what, cudaStream_t stream);
// Sets a word to the number of the bundle that the push before it in the stream belongs to.
void launch_pushed(const SenderDevice& sender, int slot, std::uint64_t* word, cudaStream_t stream);

// simulated_link.cu

// Before a piece that takes so many nanoseconds by the link: it is under way from now on.
void launch_depart(const SenderDevice& sender, const LinkDevice& link, std::uint64_t ns,
                   cudaStream_t stream);
// Before a commit: waits until all pieces of the bundle have arrived.
void launch_arrive(const SenderDevice& sender, const LinkDevice& link, int slot,
                   cudaStream_t stream);

// Loads all kernels onto the current device. Loading one lazily may wait for running kernels,
// which may be waiting for the one to be loaded.
void preload_kernels();
void preload_signals();
void preload_put();
void preload_get();
void preload_fill();
void preload_memsets();
void preload_nccl_signals();
void preload_simulated_link();

}  // namespace asyncdiff
