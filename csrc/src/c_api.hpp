// What the C functions of both libraries have in common.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

#include "asyncdiff/asyncdiff.h"
#include "asyncdiff/export.hpp"
#include "asyncdiff/fabric.hpp"
#include "asyncdiff/rendezvous.hpp"

struct asyncdiff_fabric {
  std::shared_ptr<asyncdiff::Fabric> fabric;
};

namespace asyncdiff::c_api {

// Does the work, keeps what it throws as this thread's last error, and returns its number.
ASYNCDIFF_EXPORT asyncdiff_code guarded(const std::function<void()>& work);

ASYNCDIFF_EXPORT void check_given(const void* pointer, const char* what);
// Throws InvalidArgument, naming it, for a null pointer.
template <class T>
T& given(T* pointer, const char* what) {
  check_given(pointer, what);
  return *pointer;
}

// 0: what the environment says.
ASYNCDIFF_EXPORT double seconds(double deadline);
ASYNCDIFF_EXPORT std::shared_ptr<Rendezvous> meet(const char* host, int port, int process,
                                                  int processes, const void* key,
                                                  std::size_t key_nbytes, double timeout);

}  // namespace asyncdiff::c_api
