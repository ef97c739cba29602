// Launches of kernels that need not wait for the kernel before them to be set up.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "check.hpp"

namespace asyncdiff {

struct Grid {
  unsigned blocks;
  unsigned threads;
};

// Whether the current device can do it: from compute capability 9.0.
inline bool launches_early() {
  constexpr int kDevices = 64;
  static std::atomic<int> majors[kDevices] = {};  // 0: not asked yet
  int device = 0;
  check_cuda(cudaGetDevice(&device), "reading the current device");
  int major = device < kDevices ? majors[device].load(std::memory_order_relaxed) : 0;
  if (major == 0) {
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
               "reading a device's compute capability");
    if (device < kDevices) majors[device].store(major, std::memory_order_relaxed);
  }
  return major >= 9;
}

// Launches by programmatic dependent launch: the kernel must call ptx::wait_for_previous_kernel()
// before it touches memory. Where what precedes it in the stream is no kernel, and under capture
// where the graph has no such edge, it is an ordinary launch.
template <class... Parameters, class... Arguments>
void launch_early(void (*kernel)(Parameters...), Grid grid, cudaStream_t stream, const char* what,
                  const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments));
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const auto* const function = reinterpret_cast<const void*>(kernel);
  if (!launches_early()) {
    // Not <<<>>>: that takes three calls of the runtime, a quarter of a microsecond longer.
    check_cuda(cudaLaunchKernel(function, grid.blocks, grid.threads, addresses, 0, stream), what);
    return;
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelExC(&config, function, addresses), what);
}

}  // namespace asyncdiff
