// The kernels that wait for an epoch or publish one, of a warp each. Also compiled for the CPU, by
// a test.
#pragma once

#include <cstdint>

#include "asyncdiff/channel_receiver.hpp"
#include "asyncdiff/channel_sender.hpp"

namespace asyncdiff {

// Whether it holds in every lane of the warp.
__device__ inline bool everywhere(bool mine) { return __all_sync(~0u, mine) != 0; }

__global__ void begin_kernel(SenderDevice sender, int slot) {
  SenderCounters& counters = *sender.counters;
  const std::uint64_t done = counters.begun;
  bool good = true;
  if (threadIdx.x == 0) {
    good = in_turn(sender.context, Operation::kBegin, slot, done, done == counters.committed,
                   sender.slots);
  }
  // Pushes look at `begun`: a begin that failed grants no slot.
  if (!everywhere(good) || !Credit(sender).wait(sender, done + 1, slot)) return;
  if (threadIdx.x == 0) counters.begun = done + 1;
}

__global__ void commit_kernel(SenderDevice sender, int slot) {
  SenderCounters& counters = *sender.counters;
  const std::uint64_t epoch = counters.committed + 1;
  bool good = true;
  if (threadIdx.x == 0) {
    good = in_turn(sender.context, Operation::kCommit, slot, epoch - 1, counters.begun == epoch,
                   sender.slots);
    if (good) counters.committed = epoch;
  }
  if (!everywhere(good) || sender.protocol == Protocol::kInline) return;
  for (int i = threadIdx.x; i < sender.receivers * sender.flags; i += kWarp) {
    std::uint64_t* first = sender.arrived[i / sender.flags];
    ptx::store_release_system(first + i % sender.flags * kFlagStride, epoch);
  }
}

__global__ void get_kernel(ReceiverDevice receiver, int slot) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_launch();
  ReceiverCounters& counters = *receiver.counters;
  const std::uint64_t done = counters.got;
  bool good = true;
  if (threadIdx.x == 0) {
    good = in_turn(receiver.context, Operation::kGet, slot, done, true, receiver.slots);
  }
  if (!everywhere(good)) return;
  if (static_cast<int>(threadIdx.x) < receiver.flags) {
    good = wait_for_flag(receiver, slot, done + 1, static_cast<int>(threadIdx.x));
  }
  if (everywhere(good) && threadIdx.x == 0) counters.got = done + 1;
}

__global__ void release_kernel(ReceiverDevice receiver, int slot) {
  ptx::wait_for_previous_kernel();
  ptx::let_next_kernel_launch();
  if (threadIdx.x != 0) return;
  ReceiverCounters& counters = *receiver.counters;
  if (!in_turn(receiver.context, Operation::kRelease, slot, counters.released,
               counters.released != counters.got, receiver.slots)) {
    return;
  }
  ptx::store_release_system(receiver.credit, ++counters.released);
}

}  // namespace asyncdiff
