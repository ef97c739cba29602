// Streams and data come as integers; the Python class Channel checks tensors and gives pointers.
#include "asyncdiff/channel.hpp"

#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "bindings.hpp"
#include "gil.hpp"
#include "pointers.hpp"

namespace py = pybind11;

namespace asyncdiff::bindings {

void register_channel(py::module_& m) {
  using Unlocked = py::call_guard<WithoutGil>;  // host channels block
  py::class_<Channel, std::shared_ptr<Channel>>(m, "Channel")
      .def_property_readonly("name", &Channel::name)
      .def_property_readonly("sender", &Channel::sender)
      .def_property_readonly("receivers",
                             [](const Channel& c) { return py::tuple(py::cast(c.receivers())); })
      .def_property_readonly("layout", &Channel::layout, py::return_value_policy::copy)
      .def_property_readonly("slots", &Channel::slots)
      .def("slot", &Channel::slot, py::arg("receiver"), py::arg("slot"))
      .def("begin", &Channel::begin, py::arg("slot"), py::arg("stream"), Unlocked())
      .def(
          "push",
          [](Channel& c, std::size_t index, std::uintptr_t data, int slot, Stream stream) {
            c.push(index, reinterpret_cast<const void*>(data), slot, stream);
          },
          py::arg("index"), py::arg("data"), py::arg("slot"), py::arg("stream"), Unlocked())
      .def(
          "push_array",
          [](Channel& c, std::size_t index, const py::handle& array, int slot, Stream stream,
             bool on_gpu) {
            if (index >= c.layout().specs.size()) return false;
            const auto address = address_of(array, c.layout().specs[index], on_gpu);
            if (!address) return false;
            const WithoutGil unlocked;  // the caller holds the array
            c.push(index, *address, slot, stream);
            return true;
          },
          py::arg("index"), py::arg("array"), py::arg("slot"), py::arg("stream"), py::arg("on_gpu"))
      .def("commit", &Channel::commit, py::arg("slot"), py::arg("stream"), Unlocked())
      .def_property_readonly("mode", [](const Channel& c) { return name_of(c.mode()); })
      .def(
          "put",
          [](Channel& c, const std::vector<std::uintptr_t>& data, int slot, Stream stream) {
            c.put(pointers<const void*>(data), slot, stream);
          },
          py::arg("data"), py::arg("slot"), py::arg("stream"), Unlocked())
      .def(
          "put_arrays",
          [](Channel& c, const py::handle& arrays, int slot, Stream stream, bool on_gpu) {
            const auto held = addresses_of(arrays, c.layout(), on_gpu);
            if (!held) return false;
            const WithoutGil unlocked;
            c.put(held->addresses, slot, stream);
            return true;
          },
          py::arg("arrays"), py::arg("slot"), py::arg("stream"), py::arg("on_gpu"))
      .def(
          "addresses",
          [](const Channel& c, const py::handle& arrays, bool on_gpu) -> py::object {
            const auto held = addresses_of(arrays, c.layout(), on_gpu);
            if (!held) return py::none();
            py::list out;
            for (const void* at : held->addresses) out.append(reinterpret_cast<std::uintptr_t>(at));
            return out;
          },
          py::arg("arrays"), py::arg("on_gpu"))
      .def("get", &Channel::get, py::arg("receiver"), py::arg("slot"), py::arg("stream"),
           Unlocked())
      .def("wait_for", &Channel::wait_for, py::arg("receiver"), py::arg("count"), Unlocked())
      .def("wait_free", &Channel::wait_free, py::arg("count"), Unlocked())
      .def("release", &Channel::release, py::arg("receiver"), py::arg("slot"), py::arg("stream"),
           Unlocked())
      .def("close", &Channel::close, Unlocked());
}

}  // namespace asyncdiff::bindings
