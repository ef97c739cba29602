// Functions of the driver, asked for by name: the package also has to load where there is none.
#pragma once

#include <cuda_runtime_api.h>

#include "check.hpp"

namespace asyncdiff {

// As CUDA 12.0 has it; null where the driver is older. Throws CudaError where it cannot be asked.
template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  constexpr int kSince = 12000;
#if CUDART_VERSION >= 12050
  const cudaError_t code =
      cudaGetDriverEntryPointByVersion(name, &function, kSince, cudaEnableDefault, &result);
#else
  static_assert(CUDART_VERSION >= kSince);
  const cudaError_t code = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &result);
#endif
  check_cuda(code, "looking for a function of the driver");
  return reinterpret_cast<Function>(function);
}

}  // namespace asyncdiff
