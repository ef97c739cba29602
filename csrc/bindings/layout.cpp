#include "asyncdiff/layout.hpp"

#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "bindings.hpp"

namespace py = pybind11;

namespace asyncdiff::bindings {

void register_layout(py::module_& m) {
  using Numbers = std::vector<std::int64_t>;

  py::class_<TensorSpec>(m, "TensorSpec",
                         "One tensor of a bundle: element type by its common name ('float16'), "
                         "shape, and dense strides in elements (None: row-major).")
      .def(py::init([](std::string dtype, Numbers shape, std::optional<Numbers> strides) {
             if (strides && strides->size() != shape.size()) {
               throw InvalidArgument("strides and shape differ in length");
             }
             return TensorSpec(std::move(dtype), std::move(shape),
                               strides ? std::move(*strides) : Numbers{});
           }),
           py::arg("dtype"), py::arg("shape"), py::arg("strides") = py::none())
      .def_readonly("dtype", &TensorSpec::dtype)
      .def_property_readonly("shape",
                             [](const TensorSpec& s) { return py::tuple(py::cast(s.shape)); })
      .def_property_readonly("strides",
                             [](const TensorSpec& s) { return py::tuple(py::cast(s.strides)); })
      .def_readonly("nbytes", &TensorSpec::nbytes)
      .def("same_strides", &TensorSpec::same_strides, py::arg("strides"),
           "Whether these strides (as many as the shape is long) lay a tensor out like this spec.")
      .def("__repr__", [](const TensorSpec& s) { return "TensorSpec(" + s.describe() + ")"; });

  py::class_<Layout>(m, "Layout",
                     "Where each tensor of a bundle lies in a slot: one after another, each at a "
                     "multiple of 256 bytes.")
      .def(py::init<std::vector<TensorSpec>>(), py::arg("specs"))
      .def_property_readonly("specs", [](const Layout& l) { return py::tuple(py::cast(l.specs)); })
      .def_property_readonly("offsets",
                             [](const Layout& l) { return py::tuple(py::cast(l.offsets)); })
      .def_readonly("nbytes", &Layout::nbytes);
}

}  // namespace asyncdiff::bindings
