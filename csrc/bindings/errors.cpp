// C++ errors become the Python classes of asyncdiff_core.errors, attributes included.
#include "asyncdiff/errors.hpp"

#include <pybind11/stl.h>

#include <exception>
#include <vector>

#include "bindings.hpp"
#include "text.hpp"

namespace py = pybind11;

namespace asyncdiff::bindings {

namespace {

// Fetched once: an error may come when nothing can be imported, as while a signal is pending. Never
// given back: errors also come while the interpreter ends.
struct Classes {
  explicit Classes(const py::module_& errors)
      : timeout(errors.attr("ExchangeTimeout")),
        lost(errors.attr("ProcessLost")),
        late(errors.attr("CollectiveTimeout")),
        slot_order(errors.attr("SlotOrderError")),
        aborted(errors.attr("Aborted")),
        argument(errors.attr("InvalidArgument")),
        authentication(errors.attr("AuthenticationError")),
        device(errors.attr("DeviceError")),
        cuda(errors.attr("CudaError")),
        nccl(errors.attr("NcclError")),
        core(errors.attr("CoreError")) {}

  py::object timeout, lost, late, slot_order, aborted, argument, authentication, device, cuda, nccl,
      core;
};

const Classes* classes = nullptr;

void raise(const py::object& type, const std::exception& error, const py::dict& attributes = {}) {
  const py::object value = type(text_of(error.what()), **attributes);
  PyErr_SetObject(type.ptr(), value.ptr());
}

py::tuple tuple_of(const std::vector<int>& ranks) { return py::tuple(py::cast(ranks)); }

py::dict attributes_of(const Incident& i) {
  using namespace pybind11::literals;
  return py::dict("rank"_a = i.rank, "channel"_a = text_of(i.channel), "slot"_a = i.slot,
                  "expected"_a = i.expected, "seen"_a = i.seen,
                  "operation"_a = text_of(i.operation));
}

void raise_like(const std::exception_ptr& pointer) {
  using namespace pybind11::literals;
  try {
    std::rethrow_exception(pointer);
  } catch (const ExchangeTimeout& e) {
    py::dict attributes = attributes_of(e.incident);
    attributes["peer"] = e.incident.peer;
    attributes["straggler"] = e.incident.straggler;
    raise(classes->timeout, e, attributes);
  } catch (const SlotOrderError& e) {
    raise(classes->slot_order, e, attributes_of(e.incident));
  } catch (const ProcessLost& e) {
    raise(classes->lost, e, py::dict("process"_a = e.process, "ranks"_a = tuple_of(e.ranks)));
  } catch (const CollectiveTimeout& e) {
    raise(classes->late, e, py::dict("process"_a = e.process, "ranks"_a = tuple_of(e.ranks)));
  } catch (const Aborted& e) {
    raise(classes->aborted, e, py::dict("rank"_a = e.rank));
  } catch (const InvalidArgument& e) {
    raise(classes->argument, e);
  } catch (const AuthenticationError& e) {
    raise(classes->authentication, e);
  } catch (const DeviceError& e) {
    raise(classes->device, e);
  } catch (const CudaError& e) {
    raise(classes->cuda, e);
  } catch (const NcclError& e) {
    raise(classes->nccl, e);
  } catch (const Error& e) {
    raise(classes->core, e);
  }
}

void translate(std::exception_ptr pointer) {
  if (!pointer) return;
  try {
    raise_like(pointer);
  } catch (py::error_already_set& e) {
    // Python's own, or what came up while it made one of ours, as KeyboardInterrupt may.
    e.restore();
  }
}

}  // namespace

void register_errors(py::module_&) {
  classes = new Classes(py::module_::import("asyncdiff_core.errors"));
  py::register_local_exception_translator(&translate);
}

}  // namespace asyncdiff::bindings
