// The lock of Python's interpreter (GIL), given up while the library waits.
#pragma once

#include <Python.h>
#include <unistd.h>

namespace asyncdiff::bindings {

// For destructors: work that takes the GIL, and throws nothing itself. Up to Python 3.13 a thread
// that asks for the GIL while the interpreter ends is made to exit, by unwinding its stack, which
// no destructor lets through: std::terminate would end the process. So it waits for the end of the
// process here, as Python itself has it wait from 3.14 on.
template <class Work>
void taking_gil(Work work) noexcept {
  try {
    work();
  } catch (...) {
    while (true) pause();
  }
}

// Without the GIL for the life of the object, which a thread makes that holds it.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() {
    taking_gil([this] { PyEval_RestoreThread(state_); });
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace asyncdiff::bindings
