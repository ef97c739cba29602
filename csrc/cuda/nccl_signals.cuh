// The kernels at the ends of a channel between hosts that say what has been done, of a thread each.
// Also compiled for the CPU, by a test.
#pragma once

#include <cstdint>

#include "asyncdiff/channel_sender.hpp"
#include "nccl_link.hpp"

namespace asyncdiff {

// What the kernel before it in the stream has stored is visible to who sees the words.
__global__ void publish_kernel(Publication what) {
  if (what.device != nullptr) ptx::store_release_system(what.device, what.bundle);
  ptx::store_release_system(what.host, what.message);
}

// Behind a push: that its tensor belongs to the bundle that has begun. Nothing, where that push was
// out of turn.
__global__ void pushed_kernel(SenderDevice sender, int slot, std::uint64_t* word) {
  const std::uint64_t begun = sender.counters->begun;
  const auto ring = static_cast<std::uint64_t>(sender.slots);
  if (begun != sender.counters->committed + 1) return;
  if ((begun - 1) % ring == static_cast<std::uint64_t>(slot)) {
    ptx::store_release_system(word, begun);
  }
}

}  // namespace asyncdiff
