#include "asyncdiff/fabric.hpp"

#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "asyncdiff/env.hpp"
#include "asyncdiff/host_fabric.hpp"
#include "asyncdiff/simulated_link.hpp"
#include "bindings.hpp"
#include "gil.hpp"
#include "pointers.hpp"
#include "rendezvous.hpp"
#include "text.hpp"
#ifdef ASYNCDIFF_WITH_CUDA
#include "asyncdiff/cuda_fabric.hpp"
#endif

namespace py = pybind11;

namespace asyncdiff::bindings {

namespace {

using OnePut = std::tuple<std::shared_ptr<Channel>, std::vector<std::uintptr_t>, int>;

double deadline_or_default(const std::optional<double>& seconds) {
  return seconds ? *seconds : env::deadline();
}

std::optional<SimulatedLink> link_or_default(const std::optional<std::string>& text) {
  return text ? simulated_link_from(*text) : env::link();
}

}  // namespace

void register_fabric(py::module_& m) {
  using Unlocked = py::call_guard<WithoutGil>;
  py::class_<Fabric, std::shared_ptr<Fabric>>(m, "Fabric")
      .def_property_readonly("ranks", &Fabric::ranks)
      .def_property_readonly("kind", &Fabric::kind)
      .def_property_readonly("hosts",
                             [](const Fabric& f) { return py::tuple(py::cast(f.hosts())); })
      .def_property_readonly("recovers", &Fabric::recovers)
      .def_property_readonly("deadline", &Fabric::deadline)
      .def("links", &Fabric::links)
      .def_property_readonly("simulated_link", &Fabric::simulated_link)
      .def("link_reasons",
           [](const Fabric& f) {
             py::dict out;
             for (const auto& [pair, reason] : f.link_reasons()) {
               out[py::cast(pair)] = text_of(reason);
             }
             return out;
           })
      .def(
          "channel",
          [](Fabric& f, int sender, const std::vector<int>& receivers, const Layout& layout,
             int slots, const std::string& name, const std::string& mode) {
            return f.channel(sender, receivers, layout, slots, name, mode_from(mode));
          },
          py::arg("sender"), py::arg("receivers"), py::arg("layout"), py::arg("slots"),
          py::arg("name"), py::arg("mode"), Unlocked())
      .def(
          "put_batch",
          [](Fabric& f, const std::vector<OnePut>& puts, Stream stream) {
            std::vector<Put> all;
            for (const auto& [channel, data, slot] : puts) {
              all.push_back({channel, pointers<const void*>(data), slot});
            }
            f.put_batch(all, stream);
          },
          py::arg("puts"), py::arg("stream"), Unlocked())
      .def("abort", &Fabric::abort, py::arg("rank"), py::arg("reason"), Unlocked())
      .def("check", &Fabric::check, Unlocked())
      .def("reset", &Fabric::reset, py::arg("first_bundle"), Unlocked())
      .def(
          "all_gather",
          [](const Fabric& f, const py::bytes& bytes, std::optional<double> seconds) {
            const std::string mine = bytes;
            std::vector<std::string> all;
            {
              const WithoutGil unlocked;
              all = f.all_gather(mine, seconds ? *seconds : f.deadline());
            }
            py::list out;
            for (const std::string& text : all) out.append(py::bytes(text));
            return out;
          },
          py::arg("mine"), py::arg("seconds"))
      .def("heartbeat", &Fabric::heartbeat, py::arg("doing"), Unlocked())
      .def("close", &Fabric::close, Unlocked());

  py::class_<HostFabric, Fabric, std::shared_ptr<HostFabric>>(m, "HostFabric")
      .def(py::init([](int ranks, std::optional<double> deadline,
                       const std::optional<std::string>& link) {
             return std::make_shared<HostFabric>(ranks, deadline_or_default(deadline),
                                                 link_or_default(link));
           }),
           py::arg("ranks"), py::arg("deadline"), py::arg("link"));
  m.def(
      "make_host_fabric",
      [](std::vector<int> owners, std::optional<double> deadline, py::object r,
         const std::optional<std::string>& text) {
        std::shared_ptr<Rendezvous> rendezvous = rendezvous_from(std::move(r));
        const double seconds = deadline_or_default(deadline);
        const std::optional<SimulatedLink> link = link_or_default(text);
        const WithoutGil unlocked;
        return make_host_fabric(std::move(owners), seconds, std::move(rendezvous), link);
      },
      py::arg("owners"), py::arg("deadline"), py::arg("rendezvous"), py::arg("link"));
  m.def("transport_of_environment", &env::transport);
  m.def("link_of_environment", [] {
    const std::optional<SimulatedLink> link = env::link();
    return link ? link->describe() : std::string();
  });

#ifdef ASYNCDIFF_WITH_CUDA
  py::class_<CudaFabric, Fabric, std::shared_ptr<CudaFabric>>(m, "CudaFabric")
      .def(py::init([](std::vector<int> devices, std::optional<double> deadline,
                       std::optional<std::string> transport,
                       const std::optional<std::string>& text) {
             const Transport how = transport_from(transport ? *transport : env::transport());
             const double seconds = deadline_or_default(deadline);
             const std::optional<SimulatedLink> link = link_or_default(text);
             const WithoutGil unlocked;
             return std::make_shared<CudaFabric>(std::move(devices), seconds, how, link);
           }),
           py::arg("devices"), py::arg("deadline"), py::arg("transport"), py::arg("link"))
      .def_property_readonly("devices",
                             [](const CudaFabric& f) { return py::tuple(py::cast(f.devices())); });
  m.def(
      "make_cuda_fabric",
      [](std::vector<int> devices, std::vector<int> owners, std::optional<double> deadline,
         std::optional<std::string> transport, py::object r,
         const std::optional<std::string>& text) {
        std::shared_ptr<Rendezvous> rendezvous = rendezvous_from(std::move(r));
        const Transport how = transport_from(transport ? *transport : env::transport());
        const double seconds = deadline_or_default(deadline);
        const std::optional<SimulatedLink> link = link_or_default(text);
        const WithoutGil unlocked;
        return make_cuda_fabric(std::move(devices), std::move(owners), seconds, how,
                                std::move(rendezvous), link);
      },
      py::arg("devices"), py::arg("owners"), py::arg("deadline"), py::arg("transport"),
      py::arg("rendezvous"), py::arg("link"));
#endif
}

}  // namespace asyncdiff::bindings
