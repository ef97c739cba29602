// Text that may come from other processes, which may send anything.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace asyncdiff::bindings {

// As Python text; what is not UTF-8 becomes a replacement character.
inline pybind11::str text_of(const std::string& bytes) {
  const auto size = static_cast<Py_ssize_t>(bytes.size());
  PyObject* text = PyUnicode_DecodeUTF8(bytes.data(), size, "replace");
  if (text == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::str>(text);
}

}  // namespace asyncdiff::bindings
