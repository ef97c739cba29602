#include "asyncdiff/memory.hpp"

#include <cstdint>

#include "bindings.hpp"

namespace py = pybind11;

namespace asyncdiff::bindings {

namespace {

py::dict interface_of(const Buffer& buffer) {
  py::dict out;
  out["shape"] = py::make_tuple(buffer.nbytes);
  out["typestr"] = "|u1";
  out["data"] = py::make_tuple(reinterpret_cast<std::uintptr_t>(buffer.data), false);
  out["version"] = 3;
  return out;
}

}  // namespace

void register_memory(py::module_& m) {
  py::class_<Buffer>(m, "Buffer",
                     "Bytes of a slot, readable and writable in place: numpy.asarray on the host, "
                     "torch.as_tensor or cupy.asarray on a GPU (uint8). Keeps its memory.")
      .def_property_readonly(
          "pointer", [](const Buffer& b) { return reinterpret_cast<std::uintptr_t>(b.data); })
      .def_readonly("nbytes", &Buffer::nbytes)
      .def_property_readonly(
          "device",
          [](const Buffer& b) -> py::object {
            if (b.device == Buffer::kHost) return py::none();
            return py::int_(b.device);
          },
          "CUDA device index, or None for host memory.")
      .def_property_readonly("__array_interface__",
                             [](const Buffer& b) {
                               if (b.device != Buffer::kHost) {
                                 throw py::attribute_error("the buffer lies on a GPU");
                               }
                               return interface_of(b);
                             })
      .def_property_readonly("__cuda_array_interface__", [](const Buffer& b) {
        if (b.device == Buffer::kHost) throw py::attribute_error("the buffer lies on the host");
        return interface_of(b);
      });
}

}  // namespace asyncdiff::bindings
