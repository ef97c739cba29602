// C++ errors become the Python classes of asyncdiff_core.errors, attributes included.
#include "asyncdiff/errors.hpp"

#include <exception>

#include "bindings.hpp"

namespace py = pybind11;

namespace asyncdiff::bindings {

namespace {

void raise(const char* name, const std::exception& error, const py::dict& attributes = {}) {
  const py::object type = py::module_::import("asyncdiff_core.errors").attr(name);
  const py::object value = type(error.what(), **attributes);
  PyErr_SetObject(type.ptr(), value.ptr());
}

py::dict attributes_of(const Incident& i) {
  using namespace pybind11::literals;
  return py::dict("rank"_a = i.rank, "channel"_a = i.channel, "slot"_a = i.slot,
                  "expected"_a = i.expected, "seen"_a = i.seen, "operation"_a = i.operation);
}

void translate(std::exception_ptr pointer) {
  using namespace pybind11::literals;
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (const ExchangeTimeout& e) {
    py::dict attributes = attributes_of(e.incident);
    attributes["peer"] = e.incident.peer;
    raise("ExchangeTimeout", e, attributes);
  } catch (const SlotOrderError& e) {
    raise("SlotOrderError", e, attributes_of(e.incident));
  } catch (const Aborted& e) {
    raise("Aborted", e, py::dict("rank"_a = e.rank));
  } catch (const InvalidArgument& e) {
    raise("InvalidArgument", e);
  } catch (const DeviceError& e) {
    raise("DeviceError", e);
  } catch (const CudaError& e) {
    raise("CudaError", e);
  } catch (const Error& e) {
    raise("CoreError", e);
  }
}

}  // namespace

void register_errors(py::module_&) { py::register_local_exception_translator(&translate); }

}  // namespace asyncdiff::bindings
