// A Python object with process, processes and all_gather(bytes), as a C++ Rendezvous.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "asyncdiff/rendezvous.hpp"

namespace asyncdiff::bindings {

std::shared_ptr<Rendezvous> rendezvous_from(pybind11::object object);

}  // namespace asyncdiff::bindings
