#include "cuda_shared.hpp"

#include <cstddef>
#include <exception>
#include <utility>
#include <vector>

#include "agreement.hpp"

namespace asyncdiff {

namespace {

constexpr std::size_t kNoteLines = (sizeof(AbortNote) + FlagPool::kLine - 1) / FlagPool::kLine;

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

Processes agreed(Processes all, Transport how) {
  agree_on_fabric(all, "cuda", name_of(how));
  return all;
}

}  // namespace

CudaFabric::Shared::Shared(Processes all, std::vector<int> devices, double deadline_seconds,
                           Transport how)
    : topology(agreed(std::move(all), how), std::move(devices)),
      reclaimer(topology),
      control(topology),
      // In braces, so that the lines are taken in this order.
      failures{control.host(), control.take(ControlMemory::kHost),
               control.take(ControlMemory::kHost, kNoteLines), deadline_seconds} {
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
}

CudaFabric::Shared::~Shared() {
  if (!closed) reclaimer.leave(control.take_exported(), control.take_local());
}

void CudaFabric::Shared::deal_out_again(std::vector<ControlMemory::Lines> gone) {
  if (gone.empty()) return;
  if (failures.failed()) {
    reclaimer.retire({}, std::move(gone));  // check() has still to tell what failed
    return;
  }
  failures.forget([&](std::size_t offset) {
    return ControlMemory::contains(gone, ControlMemory::kHost, offset);
  });
  control.give_back(gone);
}

void CudaFabric::Shared::close() {
  const bool failed = failures.failed();
  closed = true;
  failures.close();
  // Unmap what others own before they free it, and the other way round.
  control.take_local();
  reclaimer.unmap();
  const Processes& processes = topology.processes();
  std::exception_ptr failure;
  bool unmapped = !processes.several();
  if (processes.several() && !failed) {
    try {
      processes.barrier();
      unmapped = true;
    } catch (...) {
      failure = std::current_exception();
    }
  }
  reclaimer.release(control.take_exported(), unmapped);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace asyncdiff
