// What the channels of a HostFabric share with it, and what its processes share.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/host_fabric.hpp"
#include "asyncdiff/memory.hpp"
#include "asyncdiff/processes.hpp"
#include "host_links.hpp"
#include "signal.hpp"

namespace asyncdiff {

// The first failure, for all to see. Plain memory without pointers: it is shared by processes.
struct HostFailure {
  enum Kind : std::uint32_t { kAborted = 1, kTimeout = 2, kSlotOrder = 3, kCallOrder = 4 };
  enum State : std::uint32_t { kNone = 0, kBeingWritten = 1, kThere = 2 };

  std::atomic<std::uint32_t> state;
  std::uint32_t kind;
  std::int32_t rank;
  std::int32_t peer;
  std::int32_t straggler;  // whom the peer waits for, and that one, and so on
  std::int32_t slot;
  std::uint64_t expected;
  std::uint64_t seen;
  char operation[16];
  char channel[128];
  char reason[512];  // of an abort
};

// One for each fabric on each of its hosts; behind it, a word for each rank: the rank that it waits
// for, plus one.
struct HostControl {
  Signal changed;  // some count or the failure has changed, or a process has gone
  HostFailure failure;

  std::atomic<std::int32_t>& waits_for(int rank) {
    return reinterpret_cast<std::atomic<std::int32_t>*>(this + 1)[rank];
  }
};

// Counts of one channel's ends. Every count has one writer. Bundles are counted from one.
struct alignas(128) HostSenderCounts {
  std::atomic<std::uint64_t> begun;
  std::atomic<std::uint64_t> committed;
};
struct alignas(128) HostReceiverCounts {
  std::atomic<std::uint64_t> got;
  std::atomic<std::uint64_t> released;
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "processes share these");

struct HostFabric::Shared {
  Shared(Processes all, double deadline_seconds, const std::optional<SimulatedLink>& link = {});
  ~Shared();
  Shared(const Shared&) = delete;
  Shared& operator=(const Shared&) = delete;

  Processes processes;
  double deadline;
  Buffer memory;  // of control
  HostControl* control = nullptr;
  std::optional<HostLinks> links;  // where they are simulated; behind control's words
  std::atomic<bool> closed{false};

  std::mutex mutex;  // guards counts
  // Counts of all channels, to be reset: memory and bytes from its start.
  std::vector<std::pair<std::weak_ptr<void>, std::pair<std::byte*, std::size_t>>> counts;

  // Zeroed memory that all of the party see; collective where they are several processes.
  Buffer allocate(const Party& party, int creator, std::size_t nbytes);

  // Notes the first failure and wakes everybody, on all hosts.
  void fail(HostFailure::Kind kind, const Incident& incident, const std::string& reason = "");
  bool failed() const {
    return control->failure.state.load(std::memory_order_acquire) != HostFailure::kNone;
  }
  // Tells other hosts for whom a rank waits now.
  void tell_waits(int rank) const;
  // The end of the chain of ranks that wait for each other, from this one.
  int straggler_from(int rank) const;
  // Throws if the fabric is closed or something has failed.
  void check() const;

 private:
  // Whether it is the first.
  bool note(HostFailure::Kind kind, const Incident& incident, const std::string& reason);
  // Notes what another host tells: a failure, or for whom a rank waits.
  void told(const std::string& text);
};

}  // namespace asyncdiff
