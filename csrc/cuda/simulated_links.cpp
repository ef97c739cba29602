#include "simulated_links.hpp"

#include <cstddef>
#include <cstdint>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

namespace {

// Of the words that all see, in the first process's part of host memory.
constexpr std::size_t kBusy = 0;

}  // namespace

SimulatedLinks::SimulatedLinks(const std::optional<SimulatedLink>& link, ControlMemory& control,
                               const Topology& topology)
    : link_(link), control_(control), ranks_(topology.ranks()) {
  if (!link_) return;
  if (topology.processes().hosts() > 1) {
    throw InvalidArgument(
        "links are simulated between ranks of one host only: unset ASYNCDIFF_LINK, or pass "
        "link='off'");
  }
  const auto ranks = static_cast<std::size_t>(ranks_);
  // In each process, so that the first has them.
  const std::size_t nbytes = ranks * ranks * sizeof(std::uint64_t);
  control.take(ControlMemory::kHost, (nbytes + FlagPool::kLine - 1) / FlagPool::kLine);
  for (int rank = 0; rank < ranks_; ++rank) {
    if (topology.mine(rank)) states_[rank] = control.take(rank, ranks);
  }
}

LinkDevice SimulatedLinks::of(int sender) const {
  LinkDevice out{};
  out.states = reinterpret_cast<LinkState*>(control_.at(sender, states_.at(sender), sender));
  if (link_->sharing != SimulatedLink::Sharing::kNone) {
    out.busy = reinterpret_cast<std::uint64_t*>(control_.at(ControlMemory::kHost, kBusy, sender));
  }
  out.rank = sender;
  out.ranks = ranks_;
  out.sharing = link_->sharing;
  out.latency_ns = link_->latency();
  return out;
}

}  // namespace asyncdiff
