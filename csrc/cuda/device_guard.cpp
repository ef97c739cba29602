#include "device_guard.hpp"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <string>

#include "driver.hpp"

namespace asyncdiff {

namespace {

void check_driver(CUresult code, const char* what) {
  if (code != CUDA_SUCCESS)
    throw CudaError(std::string(what) + ": the driver's error " + std::to_string(code));
}

// The context that the runtime uses on a device, made where there is none.
CUcontext primary_context(int device, bool anew) {
  static const auto retain =
      driver_function<decltype(&cuDevicePrimaryCtxRetain)>("cuDevicePrimaryCtxRetain");
  // Kept until the process ends, as the runtime keeps its own reference.
  constexpr int kDevices = 64;
  static std::atomic<CUcontext> known[kDevices] = {};
  if (!anew && device < kDevices) {
    if (auto* const context = known[device].load(std::memory_order_relaxed)) return context;
  }
  CUcontext context = nullptr;
  check_driver(retain(&context, device), "making a context on a device");
  if (device < kDevices) known[device].store(context, std::memory_order_relaxed);
  return context;
}

// First asked for when a guard is made, whose end must not fail.
auto set_current() {
  static const auto set = driver_function<decltype(&cuCtxSetCurrent)>("cuCtxSetCurrent");
  return set;
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  static const auto get = driver_function<decltype(&cuCtxGetCurrent)>("cuCtxGetCurrent");
  const auto set = set_current();
  CUcontext before = nullptr;
  check_driver(get(&before), "reading the current context");
  // Without a context, what the runtime calls the current device is none to rely on: it would make
  // its context current, and leave it so.
  if (before != nullptr) {
    int current = -1;
    check_cuda(cudaGetDevice(&current), "reading the current device");
    if (current == device) return;
  }
  // A second time where somebody has reset the device since.
  if (set(primary_context(device, false)) != CUDA_SUCCESS)
    check_driver(set(primary_context(device, true)), "choosing a device");
  before_ = before;
  chosen_ = true;
}

DeviceGuard::~DeviceGuard() {
  // What the runtime has made current meanwhile goes, too. None is current again where none was.
  if (chosen_) set_current()(static_cast<CUcontext>(before_));
}

}  // namespace asyncdiff
