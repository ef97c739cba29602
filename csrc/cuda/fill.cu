// What tries a link: a pattern, written by a kernel.
#include <cstdint>

#include "kernels.hpp"
#include "launch.hpp"

namespace asyncdiff {

namespace {

__global__ void fill_kernel(std::uint32_t* memory, std::uint32_t count, std::uint32_t seed) {
  for (std::uint32_t i = threadIdx.x; i < count; i += blockDim.x) memory[i] = seed + i;
}

}  // namespace

void launch_fill(std::uint32_t* memory, std::uint32_t count, std::uint32_t seed,
                 cudaStream_t stream) {
  launch<fill_kernel>(Launch::kOrdinary, {1, 256}, stream, "launching fill", memory, count, seed);
}

void preload_fill() { preload<fill_kernel>(); }

void preload_kernels() {
  preload_signals();
  preload_put();
  preload_get();
  preload_fill();
  preload_memsets();
  preload_nccl_signals();
  preload_simulated_link();
}

}  // namespace asyncdiff
