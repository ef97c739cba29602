// Work on a device that need not be the current one.
//
// From CUDA 12 on, making a device current makes a context there, of half a gigabyte. A thread that
// came from a device without one is left without a context instead: the runtime then calls the
// first device current, as it did before.
#pragma once

#include <cuda_runtime_api.h>

#include "check.hpp"

namespace asyncdiff {

// Makes it current, without making a context where that is possible. Throws nothing.
void return_to_device(int device) noexcept;

// Makes a device current for the life of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "reading the current device");
    if (previous_ != device) check_cuda(cudaSetDevice(device), "choosing a device");
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) return_to_device(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
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
