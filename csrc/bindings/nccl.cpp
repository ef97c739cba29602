#include "bindings.hpp"
#ifdef ASYNCDIFF_WITH_CUDA
#include "asyncdiff/nccl.hpp"
#endif

namespace py = pybind11;

namespace asyncdiff::bindings {

void register_nccl([[maybe_unused]] py::module_& m) {
#ifdef ASYNCDIFF_WITH_CUDA
  m.def("set_nccl_path", &set_nccl_path, py::arg("path"));
#endif
}

}  // namespace asyncdiff::bindings
