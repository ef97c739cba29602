// Calls of the CUDA runtime, checked.
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

}  // namespace asyncdiff
