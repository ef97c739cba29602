// Python's signal handlers run, and may raise, while the library waits on the host.
#include "asyncdiff/interrupt.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include "bindings.hpp"

namespace py = pybind11;

namespace asyncdiff::bindings {

namespace {

void check_signals() {
  // Python handles signals in its main thread only: the others need not wait for the GIL.
  if (syscall(SYS_gettid) != getpid()) return;
  const py::gil_scoped_acquire locked;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace

void register_interrupt(py::module_&) { set_interrupt_check(&check_signals); }

}  // namespace asyncdiff::bindings
