#include "bindings.hpp"
#include "gil.hpp"
#ifdef ASYNCDIFF_WITH_CUDA
#include <cstdint>

#include "asyncdiff/cuda_graph.hpp"
#endif

namespace py = pybind11;

namespace asyncdiff::bindings {

void register_cuda_graph([[maybe_unused]] py::module_& m) {
#ifdef ASYNCDIFF_WITH_CUDA
  m.def(
      "replace_memsets",
      [](std::uintptr_t graph, int device) {
        return replace_memsets(reinterpret_cast<cudaGraph_t>(graph), device);
      },
      py::arg("graph"), py::arg("device"), py::call_guard<WithoutGil>());
  m.def(
      "upload_graph",
      [](std::uintptr_t graph, int device) {
        upload_graph(reinterpret_cast<cudaGraphExec_t>(graph), device);
      },
      py::arg("graph"), py::arg("device"), py::call_guard<WithoutGil>());
#endif
}

}  // namespace asyncdiff::bindings
