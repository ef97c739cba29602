#include "get.cuh"
#include "kernels.hpp"
#include "launch.hpp"

namespace asyncdiff {

void launch_get_inline(const ReceiverDevice& receiver, int slot, Launch how, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(receiver.flags);
  launch<get_inline_kernel>(how, {blocks, kThreads}, stream, "launching get", receiver, slot);
}

void preload_get() { preload<get_inline_kernel>(); }

}  // namespace asyncdiff
