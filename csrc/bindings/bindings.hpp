// The parts of the Python extension, one for each concept.
#pragma once

#include <pybind11/pybind11.h>

namespace asyncdiff::bindings {

void register_errors(pybind11::module_& m);
void register_interrupt(pybind11::module_& m);
void register_layout(pybind11::module_& m);
void register_memory(pybind11::module_& m);
void register_channel(pybind11::module_& m);
void register_rendezvous(pybind11::module_& m);
void register_fabric(pybind11::module_& m);
void register_put_costs(pybind11::module_& m);
void register_cuda_graph(pybind11::module_& m);
void register_nccl(pybind11::module_& m);
void register_nvtx(pybind11::module_& m);
void register_build(pybind11::module_& m);

}  // namespace asyncdiff::bindings
