#include "kernels.hpp"
#include "launch.hpp"
#include "signals.cuh"

namespace asyncdiff {

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
