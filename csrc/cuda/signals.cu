// Kernels that wait for an epoch or publish one; copy engines move the data between them.
#include <cstdint>

#include "asyncdiff/channel_kernel.hpp"
#include "kernels.hpp"
#include "launch.hpp"

namespace asyncdiff {

namespace {

constexpr int kWarp = 32;

// Whether it holds in every lane of the warp.
__device__ bool everywhere(bool mine) { return __all_sync(~0u, mine) != 0; }

__global__ void begin_kernel(SenderDevice sender, int slot) {
  SenderCounters& counters = *sender.counters;
  const std::uint64_t done = counters.begun;
  bool good = true;
  if (threadIdx.x == 0) {
    good = in_turn(sender.context, Operation::kBegin, slot, done, done == counters.committed,
                   sender.slots);
    if (good) counters.begun = done + 1;
  }
  if (everywhere(good)) Credit(sender).wait(sender, done + 1, slot);
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
    if (good) counters.got = done + 1;
  }
  if (everywhere(good) && static_cast<int>(threadIdx.x) < receiver.flags) {
    wait_for_flag(receiver, slot, done + 1, static_cast<int>(threadIdx.x));
  }
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

}  // namespace

void launch_begin(const SenderDevice& sender, int slot, cudaStream_t stream) {
  launch<begin_kernel>(Launch::kOrdinary, {1, kWarp}, stream, "launching begin", sender, slot);
}

void launch_commit(const SenderDevice& sender, int slot, cudaStream_t stream) {
  launch<commit_kernel>(Launch::kOrdinary, {1, kWarp}, stream, "launching commit", sender, slot);
}

void launch_get(const ReceiverDevice& receiver, int slot, Launch how, cudaStream_t stream) {
  launch<get_kernel>(how, {1, kWarp}, stream, "launching get", receiver, slot);
}

void launch_release(const ReceiverDevice& receiver, int slot, Launch how, cudaStream_t stream) {
  launch<release_kernel>(how, {1, kWarp}, stream, "launching release", receiver, slot);
}

void preload_signals() {
  preload<begin_kernel>();
  preload<commit_kernel>();
  preload<get_kernel>();
  preload<release_kernel>();
}

}  // namespace asyncdiff
