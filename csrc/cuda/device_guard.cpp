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

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  check_cuda(cudaGetDevice(&current), "reading the current device");
  if (current == device) return;
  static const auto push = driver_function<decltype(&cuCtxPushCurrent)>("cuCtxPushCurrent");
  // A second time where somebody has reset the device since.
  if (push(primary_context(device, false)) != CUDA_SUCCESS)
    check_driver(push(primary_context(device, true)), "choosing a device");
  pushed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (!pushed_) return;
  static const auto pop = [] {
    try {
      return driver_function<decltype(&cuCtxPopCurrent)>("cuCtxPopCurrent");
    } catch (...) {
      return decltype(&cuCtxPopCurrent)(nullptr);
    }
  }();
  CUcontext left = nullptr;
  if (pop != nullptr) pop(&left);
}

}  // namespace asyncdiff
