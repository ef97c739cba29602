#include "cuda_shared.hpp"

#include <cstddef>
#include <cstdlib>
#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "agreement.hpp"
#include "frames.hpp"

namespace asyncdiff {

namespace {

const char* name_of(Transport how) {
  switch (how) {
    case Transport::kAuto:
      return "auto";
    case Transport::kPeer:
      return "peer";
    case Transport::kStaged:
      return "staged";
  }
  return "unknown transport";
}

Processes agreed(Processes all, Transport how, const std::optional<SimulatedLink>& link,
                 double deadline_seconds) {
  agree_on_fabric(all, "cuda", name_of(how), link ? link->describe() : "off");
  check_latency(link, deadline_seconds);
  return all;
}

}  // namespace

CudaFabric::Shared::Shared(Processes all, std::vector<int> devices, double deadline_seconds,
                           Transport how, const std::optional<SimulatedLink>& link)
    : topology(agreed(std::move(all), how, link, deadline_seconds), std::move(devices)),
      reclaimer(topology),
      control(topology),
      simulated(link, control, topology),
      failures(control.for_failures(), topology.processes().process(), topology.processes().count(),
               deadline_seconds, topology.processes().neighbours().members().front()) {
  try {
    topology.find_links(control, how);
  } catch (...) {
    // Others may have opened the lines, and nobody will tell when they are done with them.
    if (topology.processes().several()) {
      control.take_local();
      Reclaimer::abandon(control.take_exported());
    }
    throw;
  }
  topology.processes().on_end([this] {
    if (topology.processes().over()) failures.end_waits();
  });
  topology.processes().on_told([this](const std::string& bytes) {
    const std::vector<std::string> parts = unpacked(bytes);
    if (parts.size() == 2) failures.abort(std::atoi(parts[0].c_str()), parts[1]);
  });
  topology.processes().all_listen();
}

CudaFabric::Shared::~Shared() {
  const Processes& processes = topology.processes();
  if (processes.forked()) return;
  processes.leave();
  processes.on_end({});
  processes.on_told({});
  if (!closed) reclaimer.leave(control.take_exported(), control.take_local());
}

void CudaFabric::Shared::check() const {
  const Processes& processes = topology.processes();
  failures.check([&](int straggler) {
    processes.check();
    if (straggler < 0 || !processes.left(straggler)) return;
    processes.lost_because_left(straggler);
    processes.check();
  });
}

void CudaFabric::Shared::deal_out_again(Reclaimer::Taken gone) {
  if (gone.lines.empty()) return;
  if (failures.failed()) {
    reclaimer.retire({}, std::move(gone));  // check() has still to tell what failed
    return;
  }
  for (const FailureRecord* record : gone.records) failures.remove_end(record);
  control.give_back(gone.lines);
}

void CudaFabric::Shared::close() {
  const Processes& processes = topology.processes();
  const bool failed = failures.failed() || processes.over();
  closed = true;
  failures.close();
  // Unmap what others own before they free it, and the other way round.
  control.take_local();
  reclaimer.unmap();
  std::exception_ptr failure;
  bool unmapped = !processes.several();
  if (processes.several() && !failed) {
    try {
      agree_on_close(processes.everybody(), "");
      unmapped = true;
    } catch (...) {
      failure = std::current_exception();
    }
  }
  reclaimer.release(control.take_exported(), unmapped);
  processes.leave();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace asyncdiff
