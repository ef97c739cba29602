// Where the arrays of a bundle lie, for libraries with DLPack's C exchange table (torch from 2.11).
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "asyncdiff/layout.hpp"

namespace asyncdiff::bindings {

// Arrays and where they lie. Holds the arrays: a list that they came in may change at any time that
// the GIL is not held.
struct Held {
  pybind11::tuple arrays;
  std::vector<const void*> addresses;
};

// For a list or tuple of arrays, each of them like its spec and on a GPU or not. Nothing
// where one is of another library, or unlike its spec: asyncdiff_core.arrays knows all libraries,
// and what to say. Takes tens of nanoseconds an array, where looking at its attributes takes a
// microsecond.
std::optional<Held> addresses_of(const pybind11::handle& arrays, const Layout& layout, bool on_gpu);

// The same of one array that whoever calls holds.
std::optional<const void*> address_of(const pybind11::handle& array, const TensorSpec& spec,
                                      bool on_gpu);

}  // namespace asyncdiff::bindings
