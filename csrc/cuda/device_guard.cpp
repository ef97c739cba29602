#include "device_guard.hpp"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>

#include "driver.hpp"

namespace asyncdiff {

namespace {

// Whether something has made the context that the runtime uses on this device.
bool has_context(int device) noexcept {
  using GetState = decltype(&cuDevicePrimaryCtxGetState);
  try {
    static const auto get_state = driver_function<GetState>("cuDevicePrimaryCtxGetState");
    unsigned flags = 0;
    int active = 0;
    if (get_state == nullptr || get_state(device, &flags, &active) != CUDA_SUCCESS) return true;
    return active != 0;
  } catch (...) {
    return true;  // rather a context too many than another current device
  }
}

// Leaves this thread without a context, as one is that has used no GPU yet. Whether the runtime's
// current device is this one then.
bool without_context(int device) noexcept {
  using SetCurrent = decltype(&cuCtxSetCurrent);
  try {
    static const auto set_current = driver_function<SetCurrent>("cuCtxSetCurrent");
    if (set_current == nullptr || set_current(nullptr) != CUDA_SUCCESS) return false;
    int now = -1;
    return cudaGetDevice(&now) == cudaSuccess && now == device;
  } catch (...) {
    return false;
  }
}

}  // namespace

void return_to_device(int device) noexcept {
  // Asked until there is one, or is to be: it is not taken away before its device is reset.
  constexpr int kDevices = 64;
  static std::atomic<bool> known[kDevices] = {};
  const bool noted = device < kDevices && known[device].load(std::memory_order_relaxed);
  if (!noted) {
    if (!has_context(device) && without_context(device)) return;
    if (device < kDevices) known[device].store(true, std::memory_order_relaxed);
  }
  cudaSetDevice(device);
}

}  // namespace asyncdiff
