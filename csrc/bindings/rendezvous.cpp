#include "rendezvous.hpp"

#include <pybind11/stl.h>

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/socket_rendezvous.hpp"
#include "bindings.hpp"
#include "gil.hpp"

namespace py = pybind11;

namespace asyncdiff::bindings {

namespace {

class PythonRendezvous final : public Rendezvous {
 public:
  explicit PythonRendezvous(py::object object)
      : process_(object.attr("process").cast<int>()),
        processes_(object.attr("processes").cast<int>()),
        object_(std::move(object)) {}

  ~PythonRendezvous() override {
    taking_gil([this] {
      const py::gil_scoped_acquire locked;
      object_ = py::object();
    });
  }

  int process() const override { return process_; }
  int processes() const override { return processes_; }

  std::vector<std::string> all_gather(const std::string& mine) override {
    const py::gil_scoped_acquire locked;
    std::vector<std::string> out;
    for (const py::handle part : object_.attr("all_gather")(py::bytes(mine))) {
      out.push_back(py::cast<py::bytes>(part));
    }
    if (out.size() != static_cast<std::size_t>(processes_)) {
      throw InvalidArgument("the rendezvous gathered from " + std::to_string(out.size()) +
                            " processes, there are " + std::to_string(processes_));
    }
    return out;
  }

 private:
  int process_;
  int processes_;
  py::object object_;
};

}  // namespace

std::shared_ptr<Rendezvous> rendezvous_from(py::object object) {
  // One of the library's own needs no Python between.
  const py::object native = py::getattr(object, "_native", py::none());
  if (py::isinstance<SocketRendezvous>(native)) {
    return native.cast<std::shared_ptr<SocketRendezvous>>();
  }
  return std::make_shared<PythonRendezvous>(std::move(object));
}

void register_rendezvous(py::module_& m) {
  using Unlocked = py::call_guard<WithoutGil>;
  py::class_<SocketRendezvous, std::shared_ptr<SocketRendezvous>>(m, "SocketRendezvous")
      .def(py::init([](const std::string& host, int port, const std::string& path, int process,
                       int processes, const py::bytes& key, double timeout) {
             const std::string secret = key;
             const WithoutGil unlocked;
             return std::make_shared<SocketRendezvous>(SocketAddress{host, port, path}, process,
                                                       processes, secret, timeout);
           }),
           py::arg("host"), py::arg("port"), py::arg("path"), py::arg("process"),
           py::arg("processes"), py::arg("key"), py::arg("timeout"))
      .def_static("from_environment", &SocketRendezvous::from_environment, py::arg("timeout"),
                  Unlocked())
      .def_property_readonly("process", &SocketRendezvous::process)
      .def_property_readonly("processes", &SocketRendezvous::processes)
      .def("all_gather",
           [](SocketRendezvous& r, const py::bytes& bytes) {
             const std::string mine = bytes;
             std::vector<std::string> all;
             {
               const WithoutGil unlocked;
               all = r.all_gather(mine);
             }
             py::list out;
             for (const std::string& text : all) out.append(py::bytes(text));
             return out;
           })
      .def("close", &SocketRendezvous::close, Unlocked());
}

}  // namespace asyncdiff::bindings
