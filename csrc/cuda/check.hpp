// Calls of the CUDA runtime: checked, and on the right device.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

// Throws CudaError, saying what was tried.
inline void check_cuda(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // do not leave it for an unrelated check
  throw CudaError(std::string(what) + ": " + cudaGetErrorName(code) + " (" +
                  cudaGetErrorString(code) + ")");
}

// Makes a device current for the life of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "reading the current device");
    if (previous_ != device) check_cuda(cudaSetDevice(device), "choosing a device");
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace asyncdiff
