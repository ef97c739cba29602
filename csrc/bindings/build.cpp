// What the extension was built with.
#include "asyncdiff/version.hpp"
#include "bindings.hpp"
#ifdef ASYNCDIFF_WITH_CUDA
#include <cuda_runtime_api.h>

#include "asyncdiff/cuda_fabric.hpp"
#endif

namespace py = pybind11;

namespace asyncdiff::bindings {

void register_build(py::module_& m) {
  m.def("cuda_built", [] {
#ifdef ASYNCDIFF_WITH_CUDA
    return true;
#else
    return false;
#endif
  });
  m.def("cuda_devices", [] {
#ifdef ASYNCDIFF_WITH_CUDA
    return cuda_device_count();
#else
    return 0;
#endif
  });
  m.def("build_info", [] {
    py::dict out;
    out["version"] = version();
    out["compiler"] = ASYNCDIFF_COMPILER;
#ifdef ASYNCDIFF_WITH_CUDA
    out["cuda"] =
        std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    out["architectures"] = ASYNCDIFF_ARCHITECTURES;
#endif
    return out;
  });
}

}  // namespace asyncdiff::bindings
