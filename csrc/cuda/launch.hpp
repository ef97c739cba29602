// Launches of kernels, some of which need not wait for the kernel before them to be set up.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <mutex>
#include <type_traits>

#include "check.hpp"
#include "driver.hpp"

namespace asyncdiff {

struct Grid {
  unsigned blocks;
  unsigned threads;
};

// Early: by programmatic dependent launch. The kernel must call ptx::wait_for_previous_kernel()
// before it touches memory. Not where several ranks share a device: blocks that lie in wait could
// leave no room for those that they wait for.
enum class Launch { kOrdinary, kEarly };

// The driver's own launch: the runtime's looks the kernel up each time.
inline auto driver_launch() {
  static const auto found = [] {
    auto* const function = driver_function<decltype(&cuLaunchKernelEx)>("cuLaunchKernelEx");
    if (function == nullptr) throw CudaError("the driver is too old: CUDA 12 needs 525 or newer");
    return function;
  }();
  return found;
}

// A kernel as loaded onto a device.
struct LoadedKernel {
  CUfunction function = nullptr;
  // Whether it can be launched early: whether the code that runs there has the wait, which is
  // compiled for capability 9.0 and later only, whatever the device is; and whether the driver
  // knows graphs of such launches.
  bool early = false;
};

// Onto the current device; loads it there, if it is not there yet.
template <auto kKernel>
LoadedKernel loaded_kernel() {
  constexpr int kDevices = 64;
  static LoadedKernel known[kDevices];
  static std::atomic<bool> is_known[kDevices] = {};
  static std::mutex mutex;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "reading the current device");
  if (device < kDevices && is_known[device].load(std::memory_order_acquire)) return known[device];
  const auto* const symbol = reinterpret_cast<const void*>(kKernel);
  LoadedKernel out;
  check_cuda(cudaGetFuncBySymbol(&out.function, symbol), "loading a kernel");
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, symbol), "asking for a kernel's version");
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver), "asking for the driver's version");
  out.early = attributes.ptxVersion >= 90 && driver >= 12030;
  if (device < kDevices) {
    const std::lock_guard lock(mutex);
    if (!is_known[device].load(std::memory_order_relaxed)) known[device] = out;
    is_known[device].store(true, std::memory_order_release);
  }
  return out;
}

// For the kernels of a file, before any of them waits on the device.
template <auto kKernel>
void preload() {
  loaded_kernel<kKernel>();
}

// Where what precedes the kernel in the stream is no kernel, early is ordinary.
template <auto kKernel, class... Arguments>
void launch(Launch how, Grid grid, cudaStream_t stream, const char* what,
            const Arguments&... arguments) {
  static_assert(std::is_same_v<decltype(kKernel), void (*)(Arguments...)>);
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const LoadedKernel kernel = loaded_kernel<kKernel>();
  CUlaunchAttribute early{};
  early.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  early.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config{};
  config.gridDimX = grid.blocks;
  config.blockDimX = grid.threads;
  config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
  config.hStream = stream;
  config.attrs = &early;
  config.numAttrs = how == Launch::kEarly && kernel.early ? 1 : 0;
  // The codes of the runtime's errors are the driver's.
  const CUresult code = driver_launch()(&config, kernel.function, addresses, nullptr);
  check_cuda(static_cast<cudaError_t>(code), what);
}

}  // namespace asyncdiff
