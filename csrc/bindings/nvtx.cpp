#include "nvtx.hpp"

#include "bindings.hpp"

namespace py = pybind11;

namespace asyncdiff::bindings {

void register_nvtx(py::module_& m) {
  m.def("nvtx_listening", &nvtx::listening);
  m.def("nvtx_push", [](const char* message) { nvtx::push(message); }, py::arg("message"));
  m.def("nvtx_pop", &nvtx::pop);
}

}  // namespace asyncdiff::bindings
