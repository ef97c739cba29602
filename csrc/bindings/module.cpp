#include "bindings.hpp"

PYBIND11_MODULE(_core, m) {
  m.doc() = "Bindings of the asyncdiff library. Use the package asyncdiff_core.";
  using namespace asyncdiff::bindings;
  register_errors(m);
  register_interrupt(m);
  register_layout(m);
  register_memory(m);
  register_channel(m);
  register_rendezvous(m);
  register_fabric(m);
  register_put_costs(m);
  register_cuda_graph(m);
  register_nccl(m);
  register_nvtx(m);
  register_build(m);
}
