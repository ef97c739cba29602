#include "rendezvous.hpp"

#include <pybind11/stl.h>

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"

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
    const py::gil_scoped_acquire locked;
    object_ = py::object();
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
  return std::make_shared<PythonRendezvous>(std::move(object));
}

}  // namespace asyncdiff::bindings
