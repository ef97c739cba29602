// The kernel of a get of an inline bundle. Also compiled for the CPU, by a test.
#pragma once

#include <cstddef>
#include <cstdint>

#include "asyncdiff/channel_receiver.hpp"
#include "tile_scheduler.cuh"

namespace asyncdiff {

// Waits for all words of the slot, and leaves what they carry in the mailbox.
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
    if (!read_inline(receiver, slot, bundle.epoch, wanted, at, value)) {
      bundle.go = false;
      break;
    }
    if (wanted) *reinterpret_cast<std::uint64_t*>(to + at) = value;
  }
  finish(receiver, false, bundle);
}

}  // namespace asyncdiff
