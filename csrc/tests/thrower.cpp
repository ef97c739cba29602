// A shared library that links ours, with errors that leave it.
#include <typeinfo>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/export.hpp"
#include "asyncdiff/host_fabric.hpp"

ASYNCDIFF_EXPORT const std::type_info* thrown_type() { return &typeid(asyncdiff::ExchangeTimeout); }

ASYNCDIFF_EXPORT void wait_in_vain() {
  asyncdiff::HostFabric fabric(2, 0.01);
  const asyncdiff::Layout layout({asyncdiff::TensorSpec("uint8", {1})});
  fabric.channel(0, {1}, layout, 2, "")->get(1, 0, 0);
}
