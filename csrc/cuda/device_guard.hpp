// Work on a device that need not be the current one.
//
// From CUDA 12 on, making a device current makes a context there, of half a gigabyte; going back
// to a device that had none would make one. So a guard makes the context current that the runtime
// uses on its device, and afterwards the one that was current before, be it none.
#pragma once

#include <cuda_runtime_api.h>

#include "check.hpp"

namespace asyncdiff {

// Makes a device current for the life of the guard.
class DeviceGuard {
 public:
  // Throws CudaError.
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  void* before_ = nullptr;  // a CUcontext
  bool chosen_ = false;
};

// For destructors, where errors are of no use, least of all when the process ends: they neither
// come out of it nor are they left for another call to find. Nothing is done where the device
// cannot be chosen.
template <class Work>
void quietly_on(int device, Work work) noexcept {
  try {
    const DeviceGuard guard(device);
    work();
  } catch (...) {
  }
  cudaGetLastError();
}

}  // namespace asyncdiff
