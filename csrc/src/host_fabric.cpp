#include "asyncdiff/host_fabric.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "agreement.hpp"
#include "asyncdiff/shared_memory.hpp"
#include "copy_text.hpp"
#include "frames.hpp"
#include "host_channel.hpp"
#include "host_shared.hpp"
#include "socket_network.hpp"
#include "spanning_fabric.hpp"

namespace asyncdiff {

namespace {

constexpr const char* kOneHost =
    "links are simulated between ranks of one host only: unset ASYNCDIFF_LINK, or pass link='off'";

}  // namespace

HostFabric::Shared::Shared(Processes all, double deadline_seconds,
                           const std::optional<SimulatedLink>& link)
    : processes(std::move(all)), deadline(deadline_seconds) {
  agree_on_fabric(processes, "host", "", link ? link->describe() : "off");
  if (link && processes.hosts() > 1) throw InvalidArgument(kOneHost);
  check_latency(link, deadline);
  const std::size_t ranks = processes.owners().size();
  const std::size_t words = ranks * sizeof(std::atomic<std::int32_t>);
  const std::size_t own = (sizeof(HostControl) + words + alignof(HostControl) - 1) /
                          alignof(HostControl) * alignof(HostControl);
  memory = allocate(processes.neighbours(), processes.neighbours().members().front(),
                    own + (link ? HostLinks::nbytes(ranks) : 0));
  control = reinterpret_cast<HostControl*>(memory.data);
  if (link) links.emplace(*link, ranks, memory.data + own);
  processes.on_told([this](const std::string& text) { told(text); });
  processes.on_end([this] { control->changed.notify(); });
  processes.all_listen();
}

HostFabric::Shared::~Shared() {
  if (processes.forked()) return;
  processes.leave();
  processes.on_end({});
  processes.on_told({});
}

Buffer HostFabric::Shared::allocate(const Party& party, int creator, std::size_t nbytes) {
  if (!processes.several()) return allocate_host(nbytes);
  return share(party, creator, nbytes);
}

int HostFabric::Shared::straggler_from(int rank) const {
  // At most once around: in a circle there is no end.
  for (std::size_t i = 0; i < processes.owners().size(); ++i) {
    const int next = control->waits_for(rank).load() - 1;
    if (next < 0) break;
    rank = next;
  }
  return rank;
}

bool HostFabric::Shared::note(HostFailure::Kind kind, const Incident& incident,
                              const std::string& reason) {
  HostFailure& failure = control->failure;
  std::uint32_t none = HostFailure::kNone;
  if (!failure.state.compare_exchange_strong(none, HostFailure::kBeingWritten)) return false;
  failure.kind = kind;
  failure.rank = incident.rank;
  failure.peer = incident.peer;
  failure.straggler = incident.straggler;
  failure.slot = incident.slot;
  failure.expected = incident.expected;
  failure.seen = incident.seen;
  copy_text(failure.operation, incident.operation);
  copy_text(failure.channel, incident.channel);
  copy_text(failure.reason, reason);
  failure.state.store(HostFailure::kThere, std::memory_order_release);
  return true;
}

void HostFabric::Shared::fail(HostFailure::Kind kind, const Incident& incident,
                              const std::string& reason) {
  const bool first = note(kind, incident, reason);
  control->changed.notify();
  if (!first || processes.hosts() == 1) return;
  const auto text = [](auto number) { return std::to_string(number); };
  processes.tell_other_hosts(
      packed({text(kind), text(incident.rank), text(incident.peer), text(incident.straggler),
              text(incident.slot), text(incident.expected), text(incident.seen), incident.operation,
              incident.channel, reason}));
}

void HostFabric::Shared::tell_waits(int rank) const {
  const std::int32_t waits_for = control->waits_for(rank).load();
  processes.tell_other_hosts(packed({std::to_string(rank), std::to_string(waits_for)}));
}

void HostFabric::Shared::told(const std::string& bytes) {
  const std::vector<std::string> parts = unpacked(bytes);
  const auto number = [&](std::size_t i) { return std::atoi(parts[i].c_str()); };
  if (parts.size() == 2 && number(0) >= 0 &&
      number(0) < static_cast<int>(processes.owners().size())) {
    control->waits_for(number(0)).store(number(1));
  }
  if (parts.size() != 10) return;
  const auto count = [&](std::size_t i) { return std::strtoull(parts[i].c_str(), nullptr, 10); };
  const Incident incident{number(1), number(2), parts[8], number(4),
                          count(5),  count(6),  parts[7], number(3)};
  note(static_cast<HostFailure::Kind>(number(0)), incident, parts[9]);
  control->changed.notify();
}

void HostFabric::Shared::check() const {
  if (closed.load()) throw Error("the fabric is closed");
  const HostFailure& failure = control->failure;
  std::uint32_t state = failure.state.load(std::memory_order_acquire);
  if (state == HostFailure::kNone) {
    processes.check();
    return;
  }
  // Writing takes a microsecond, but its thread may have to wait for a core in the middle of it, or
  // have been killed there.
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  while (state == HostFailure::kBeingWritten && std::chrono::steady_clock::now() < until) {
    std::this_thread::yield();
    state = failure.state.load(std::memory_order_acquire);
  }
  if (state != HostFailure::kThere) {
    processes.check();
    throw ProcessLost(-1, {}, "a process ended while it told others of a failure");
  }
  const Incident incident{failure.rank,     failure.peer, failure.channel,   failure.slot,
                          failure.expected, failure.seen, failure.operation, failure.straggler};
  if (failure.kind == HostFailure::kTimeout) {
    processes.check();  // it may have been a process that has ended since
    throw ExchangeTimeout(incident, deadline);
  }
  if (failure.kind == HostFailure::kSlotOrder) throw SlotOrderError(incident, OutOfTurn::kSlot);
  if (failure.kind == HostFailure::kCallOrder) throw SlotOrderError(incident, OutOfTurn::kCall);
  throw Aborted(failure.rank, failure.reason);
}

HostFabric::HostFabric(int ranks, double deadline_seconds, std::optional<SimulatedLink> link)
    : Fabric(ranks, deadline_seconds),
      shared_(std::make_shared<Shared>(Processes(ranks), deadline_seconds, link)) {}

HostFabric::HostFabric(std::vector<int> owners, double deadline_seconds,
                       std::shared_ptr<Rendezvous> rendezvous, std::optional<SimulatedLink> link)
    : Fabric(static_cast<int>(owners.size()), deadline_seconds) {
  Processes all(std::move(owners), std::move(rendezvous), deadline());
  if (all.hosts() > 1) {
    throw InvalidArgument("the processes are on " + std::to_string(all.hosts()) +
                          " hosts, and a HostFabric is of one: make_host_fabric() spans them");
  }
  shared_ = std::make_shared<Shared>(std::move(all), deadline(), link);
}

HostFabric::HostFabric(Processes all, double deadline_seconds, std::optional<SimulatedLink> link)
    : Fabric(static_cast<int>(all.owners().size()), deadline_seconds),
      shared_(std::make_shared<Shared>(std::move(all), deadline(), link)) {}

std::shared_ptr<Fabric> make_host_fabric(std::vector<int> owners, double deadline_seconds,
                                         std::shared_ptr<Rendezvous> rendezvous,
                                         std::optional<SimulatedLink> link) {
  check_fabric(static_cast<int>(owners.size()), deadline_seconds);
  Processes all(std::move(owners), std::move(rendezvous), deadline_seconds);
  const auto here = std::make_shared<HostFabric>(all, deadline_seconds, link);
  if (all.hosts() == 1) return here;
  auto network = std::make_shared<SocketNetwork>(here->shared());
  return std::make_shared<SpanningFabric>(here, std::move(network), std::move(all));
}

std::map<std::pair<int, int>, std::string> HostFabric::links() const {
  std::map<std::pair<int, int>, std::string> out;
  for (int a = 0; a < ranks(); ++a) {
    for (int b = 0; b < ranks(); ++b) {
      out[{a, b}] = a != b && shared_->links ? "simulated" : "memory";
    }
  }
  return out;
}

std::map<std::pair<int, int>, std::string> HostFabric::link_reasons() const {
  std::map<std::pair<int, int>, std::string> out;
  for (const auto& [pair, link] : links()) {
    if (link == "simulated") out[pair] = simulated_link() + " is simulated over memory";
  }
  return out;
}

std::string HostFabric::simulated_link() const {
  return shared_->links ? shared_->links->link().describe() : "";
}

std::shared_ptr<Channel> HostFabric::channel(int sender, const std::vector<int>& receivers,
                                             const Layout& layout, int slots,
                                             const std::string& name, Mode mode) {
  check_endpoints(sender, receivers, slots);
  if (shared_->closed.load()) throw Error("the fabric is closed");
  const Party ends = ends_of(sender, receivers);
  if (ends.here()) agree_on_channel(ends, sender, receivers, layout, slots, name, mode);
  return std::make_shared<HostChannel>(shared_, ends, name, sender, receivers, layout, slots, mode);
}

const Processes& HostFabric::processes() const { return shared_->processes; }

bool HostFabric::made(const Channel& channel) const {
  const auto* ours = dynamic_cast<const HostChannel*>(&channel);
  return ours != nullptr && ours->of(*shared_);
}

void HostFabric::abort(int rank, const std::string& reason) {
  if (shared_->processes.forked())
    throw Error("a forked process does not abort its parent's fabric");
  Incident incident{};
  incident.rank = rank;
  shared_->fail(HostFailure::kAborted, incident, reason);
}

void HostFabric::check() { shared_->check(); }

void HostFabric::reset(std::uint64_t first_bundle) {
  // Nobody counts on while another process still works, and nobody works while another still
  // resets.
  agree_on_reset(shared_->processes, first_bundle, [&] {
    if (shared_->closed.load()) throw Error("the fabric is closed");
  });
  if (shared_->processes.first_here()) {
    shared_->control->failure.state.store(HostFailure::kNone, std::memory_order_release);
    if (shared_->links) shared_->links->reset();
  }
  {
    const std::lock_guard lock(shared_->mutex);
    for (const auto& [owner, counts] : shared_->counts) {
      const auto memory = owner.lock();
      if (!memory) continue;
      // Each process does it: whose channel it is does not matter.
      auto* words = reinterpret_cast<std::atomic<std::uint64_t>*>(counts.first);
      for (std::size_t i = 0; i < counts.second / sizeof *words; ++i) words[i].store(first_bundle);
    }
  }
  shared_->processes.everybody().barrier();
}

void HostFabric::close() {
  shared_->closed.store(true);
  shared_->processes.leave();
  shared_->control->changed.notify();
}

}  // namespace asyncdiff
