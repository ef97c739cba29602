// Addresses come from Python as integers.
#pragma once

#include <cstdint>
#include <vector>

namespace asyncdiff::bindings {

template <class Pointer>
std::vector<Pointer> pointers(const std::vector<std::uintptr_t>& addresses) {
  std::vector<Pointer> out;
  out.reserve(addresses.size());
  for (std::uintptr_t address : addresses) out.push_back(reinterpret_cast<Pointer>(address));
  return out;
}

}  // namespace asyncdiff::bindings
