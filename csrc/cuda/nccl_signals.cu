#include "kernels.hpp"
#include "launch.hpp"
#include "nccl_signals.cuh"

namespace asyncdiff {

void launch_publish(const Publication& what, cudaStream_t stream) {
  launch<publish_kernel>(Launch::kOrdinary, {1, 1}, stream, "launching publish", what);
}

void launch_pushed(const SenderDevice& sender, int slot, std::uint64_t* word, cudaStream_t stream) {
  launch<pushed_kernel>(Launch::kOrdinary, {1, 1}, stream, "launching pushed", sender, slot, word);
}

void preload_nccl_signals() {
  preload<publish_kernel>();
  preload<pushed_kernel>();
}

}  // namespace asyncdiff
