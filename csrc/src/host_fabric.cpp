#include "asyncdiff/host_fabric.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <utility>

#include "asyncdiff/shared_memory.hpp"
#include "host_channel.hpp"
#include "host_shared.hpp"

namespace asyncdiff {

namespace {

template <std::size_t N>
void copy_text(char (&to)[N], const std::string& from) {
  std::snprintf(to, N, "%s", from.c_str());
}

std::vector<int> checked(std::vector<int> owners, const Rendezvous& rendezvous) {
  const int count = rendezvous.processes();
  if (rendezvous.process() < 0 || rendezvous.process() >= count) {
    throw InvalidArgument("the rendezvous calls this process " +
                          std::to_string(rendezvous.process()) + " of " + std::to_string(count));
  }
  for (int owner : owners) {
    if (owner < 0 || owner >= count) {
      throw InvalidArgument("owners names process " + std::to_string(owner) +
                            ", but the rendezvous has processes 0 to " + std::to_string(count - 1));
    }
  }
  return owners;
}

}  // namespace

Buffer HostFabric::Shared::allocate(int creator_rank, std::size_t nbytes) {
  if (!rendezvous) return allocate_host(nbytes);
  return share(*rendezvous, owners[static_cast<std::size_t>(creator_rank)], nbytes);
}

void HostFabric::Shared::check_mine(int rank) const {
  const int owner = owners[static_cast<std::size_t>(rank)];
  if (owner != process()) {
    throw InvalidArgument("rank " + std::to_string(rank) + " belongs to process " +
                          std::to_string(owner) + ", this is process " + std::to_string(process()));
  }
}

void HostFabric::Shared::fail(HostFailure::Kind kind, const Incident& incident,
                              const std::string& reason) {
  HostFailure& failure = control->failure;
  std::uint32_t none = HostFailure::kNone;
  if (failure.state.compare_exchange_strong(none, HostFailure::kBeingWritten)) {
    failure.kind = kind;
    failure.rank = incident.rank;
    failure.peer = incident.peer;
    failure.slot = incident.slot;
    failure.expected = incident.expected;
    failure.seen = incident.seen;
    copy_text(failure.operation, incident.operation);
    copy_text(failure.channel, incident.channel);
    copy_text(failure.reason, reason);
    failure.state.store(HostFailure::kThere, std::memory_order_release);
  }
  control->changed.notify();
}

void HostFabric::Shared::check() const {
  if (closed.load()) throw Error("the fabric is closed");
  const HostFailure& failure = control->failure;
  std::uint32_t state = failure.state.load(std::memory_order_acquire);
  if (state == HostFailure::kNone) return;
  // Writing takes a microsecond, unless the writer was killed in the middle of it.
  for (int i = 0; i < 1'000'000 && state == HostFailure::kBeingWritten; ++i) {
    state = failure.state.load(std::memory_order_acquire);
  }
  if (state != HostFailure::kThere) throw Error("a process died while it reported a failure");
  const Incident incident{failure.rank,     failure.peer, failure.channel,  failure.slot,
                          failure.expected, failure.seen, failure.operation};
  if (failure.kind == HostFailure::kTimeout) throw ExchangeTimeout(incident, deadline);
  if (failure.kind == HostFailure::kSlotOrder) throw SlotOrderError(incident);
  throw Aborted(failure.rank, failure.reason);
}

HostFabric::HostFabric(int ranks, double deadline_seconds)
    : Fabric(ranks, deadline_seconds), shared_(std::make_shared<Shared>()) {
  shared_->owners.assign(static_cast<std::size_t>(ranks), 0);
  shared_->deadline = deadline();
  shared_->memory = allocate_host(sizeof(HostControl));
  shared_->control = reinterpret_cast<HostControl*>(shared_->memory.data);
}

HostFabric::HostFabric(std::vector<int> owners, double deadline_seconds,
                       std::shared_ptr<Rendezvous> rendezvous)
    : Fabric(static_cast<int>(owners.size()), deadline_seconds),
      shared_(std::make_shared<Shared>()) {
  shared_->owners = checked(std::move(owners), *rendezvous);
  shared_->deadline = deadline();
  shared_->rendezvous = std::move(rendezvous);
  shared_->memory = shared_->allocate(0, sizeof(HostControl));
  shared_->control = reinterpret_cast<HostControl*>(shared_->memory.data);
}

std::map<std::pair<int, int>, std::string> HostFabric::links() const {
  std::map<std::pair<int, int>, std::string> out;
  for (int a = 0; a < ranks(); ++a) {
    for (int b = 0; b < ranks(); ++b) out[{a, b}] = "memory";
  }
  return out;
}

std::shared_ptr<Channel> HostFabric::channel(int sender, const std::vector<int>& receivers,
                                             const Layout& layout, int slots,
                                             const std::string& name) {
  check_endpoints(sender, receivers, slots);
  if (shared_->closed.load()) throw Error("the fabric is closed");
  return std::make_shared<HostChannel>(shared_, name, sender, receivers, layout, slots);
}

void HostFabric::abort(int rank, const std::string& reason) {
  Incident incident{};
  incident.rank = rank;
  shared_->fail(HostFailure::kAborted, incident, reason);
}

void HostFabric::check() { shared_->check(); }

void HostFabric::reset() {
  if (shared_->closed.load()) throw Error("the fabric is closed");
  const auto barrier = [this] {
    if (shared_->rendezvous) shared_->rendezvous->all_gather("");
  };
  // Nobody counts on while another process still works, and nobody works while another still
  // resets.
  barrier();
  if (shared_->process() == shared_->owners[0]) {
    shared_->control->failure.state.store(HostFailure::kNone, std::memory_order_release);
  }
  {
    const std::lock_guard lock(shared_->mutex);
    auto& all = shared_->counts;
    all.erase(
        std::remove_if(all.begin(), all.end(), [](const auto& c) { return c.first.expired(); }),
        all.end());
    for (const auto& [owner, counts] : all) {
      const auto memory = owner.lock();
      // All zero bits are a zero count. Each process does it: whose channel it is does not matter.
      if (memory) std::memset(counts.first, 0, counts.second);
    }
  }
  barrier();
}

void HostFabric::close() {
  shared_->closed.store(true);
  shared_->control->changed.notify();
}

}  // namespace asyncdiff
