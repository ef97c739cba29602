#include "arrays.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "dlpack.hpp"

namespace py = pybind11;

namespace asyncdiff::bindings {

namespace {

// The exchange table of an array's type, or null.
const dlpack::ExchangeTable* table_of(PyTypeObject* type) {
  // Bundles are of one library's arrays: its type is remembered, and kept alive, also at exit. The
  // GIL guards it.
  static PyTypeObject* known = nullptr;
  static const dlpack::ExchangeTable* table = nullptr;
  if (type == known) return table;
  const py::handle object(reinterpret_cast<PyObject*>(type));
  const py::object capsule = py::getattr(object, "__dlpack_c_exchange_api__", py::none());
  void* found = PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsule)
                    ? PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule)
                    : nullptr;
  table = static_cast<const dlpack::ExchangeTable*>(found);
  while (table != nullptr && table->major != dlpack::kMajorVersion) table = table->older;
  if (table != nullptr && table->view == nullptr) table = nullptr;
  Py_XDECREF(known);
  Py_INCREF(type);
  known = type;
  return table;
}

// The common name of an element type, or "" for those that are left to Python.
const char* name_of_type(std::uint8_t code, std::uint8_t bits) {
  const auto by_bits = [bits](const char* b8, const char* b16, const char* b32, const char* b64) {
    switch (bits) {
      case 8:
        return b8;
      case 16:
        return b16;
      case 32:
        return b32;
      case 64:
        return b64;
      default:
        return "";
    }
  };
  switch (code) {
    case dlpack::kFloat:
      return by_bits("", "float16", "float32", "float64");
    case dlpack::kBfloat:
      return by_bits("", "bfloat16", "", "");
    case dlpack::kInt:
      return by_bits("int8", "int16", "int32", "int64");
    case dlpack::kUInt:
      return by_bits("uint8", "uint16", "uint32", "uint64");
    case dlpack::kBool:
      return by_bits("bool", "", "", "");
    default:  // complex numbers may be lazily conjugated, which is not told here
      return "";
  }
}

bool is_like(const dlpack::Tensor& array, const TensorSpec& spec, bool on_gpu) {
  const bool there =
      array.device_type == dlpack::kCuda || array.device_type == dlpack::kCudaManaged;
  const bool here = array.device_type == dlpack::kCpu || array.device_type == dlpack::kCudaHost;
  if (on_gpu ? !there : !here) return false;
  const auto dims = static_cast<std::size_t>(array.ndim);
  if (dims != spec.shape.size() || array.lanes != 1) return false;
  if (spec.dtype != name_of_type(array.code, array.bits)) return false;
  if (!std::equal(spec.shape.begin(), spec.shape.end(), array.shape)) return false;
  if (dims == 0) return true;
  if (array.strides == nullptr) return false;
  // Nearly always the very strides; else in the same order, which takes a vector to find out.
  return std::equal(spec.strides.begin(), spec.strides.end(), array.strides) ||
         spec.same_strides({array.strides, array.strides + dims});
}

}  // namespace

std::optional<const void*> address_of(const py::handle& array, const TensorSpec& spec,
                                      bool on_gpu) {
  const dlpack::ExchangeTable* table = table_of(Py_TYPE(array.ptr()));
  if (table == nullptr) return std::nullopt;
  dlpack::Tensor seen;
  if (table->view(array.ptr(), &seen) != 0) {
    PyErr_Clear();
    return std::nullopt;
  }
  if (!is_like(seen, spec, on_gpu)) return std::nullopt;
  return static_cast<const std::byte*>(seen.data) + seen.byte_offset;
}

std::optional<Held> addresses_of(const py::handle& arrays, const Layout& layout, bool on_gpu) {
  if (!PyList_Check(arrays.ptr()) && !PyTuple_Check(arrays.ptr())) return std::nullopt;
  const auto count = static_cast<std::size_t>(PySequence_Fast_GET_SIZE(arrays.ptr()));
  if (count != layout.specs.size()) return std::nullopt;
  Held out{py::reinterpret_steal<py::tuple>(PySequence_Tuple(arrays.ptr())), {}};
  if (!out.arrays) throw py::error_already_set();
  PyObject** items = PySequence_Fast_ITEMS(out.arrays.ptr());
  out.addresses.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    const auto address = address_of(items[i], layout.specs[i], on_gpu);
    if (!address) return std::nullopt;
    out.addresses.push_back(*address);
  }
  return out;
}

}  // namespace asyncdiff::bindings
