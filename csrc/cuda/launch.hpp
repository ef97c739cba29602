// Launches of kernels, some of which need not wait for the kernel before them to be set up.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <type_traits>

#include "check.hpp"

namespace asyncdiff {

struct Grid {
  unsigned blocks;
  unsigned threads;
};

// Early: by programmatic dependent launch. The kernel must call ptx::wait_for_previous_kernel()
// before it touches memory. Not where several ranks share a device: blocks that lie in wait could
// leave no room for those that they wait for.
enum class Launch { kOrdinary, kEarly };

// Loads a kernel onto the current device, if it is not there yet, and says whether it can be
// launched early: whether the code that runs there has the wait, which is compiled for capability
// 9.0 and later only, whatever the device is; and whether the driver knows graphs of such launches.
template <auto kKernel>
bool can_wait() {
  constexpr int kDevices = 64;
  enum State : int { kUnknown, kNo, kYes };
  static std::atomic<int> known[kDevices] = {};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "reading the current device");
  int state = device < kDevices ? known[device].load(std::memory_order_relaxed) : kUnknown;
  if (state == kUnknown) {
    cudaFuncAttributes attributes;
    check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)),
               "loading a kernel");
    int driver = 0;
    check_cuda(cudaDriverGetVersion(&driver), "asking for the driver's version");
    state = attributes.ptxVersion >= 90 && driver >= 12030 ? kYes : kNo;
    if (device < kDevices) known[device].store(state, std::memory_order_relaxed);
  }
  return state == kYes;
}

// For the kernels of a file, before any of them waits on the device.
template <auto kKernel>
void preload() {
  can_wait<kKernel>();
}

// Where what precedes the kernel in the stream is no kernel, early is ordinary.
template <auto kKernel, class... Arguments>
void launch(Launch how, Grid grid, cudaStream_t stream, const char* what,
            const Arguments&... arguments) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(Arguments...)>);
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const auto* const function = reinterpret_cast<const void*>(kKernel);
  if (how == Launch::kOrdinary || !can_wait<kKernel>()) {
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
