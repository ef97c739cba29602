#include "host_channel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "agreement.hpp"
#include "nvtx.hpp"

namespace asyncdiff {

namespace {

constexpr std::size_t kPage = 4096;

// Before so much of the deadline is left, other hosts do not learn that a rank waits.
constexpr double kLong = 0.75;

// How late a wait with a time limit may end.
constexpr std::chrono::microseconds kWakes{100};

std::chrono::steady_clock::duration limit_of(std::chrono::duration<double> seconds) {
  return std::chrono::duration_cast<std::chrono::steady_clock::duration>(seconds);
}

std::size_t round_up(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// Says whom a rank waits for, while it does; to other hosts where it takes long.
class Waiting {
 public:
  Waiting(HostFabric::Shared& fabric, int rank, int peer) : fabric_(fabric), rank_(rank) {
    fabric_.control->waits_for(rank_).store(peer + 1);
  }
  ~Waiting() {
    fabric_.control->waits_for(rank_).store(0);
    if (long_) fabric_.tell_waits(rank_);
  }
  Waiting(const Waiting&) = delete;
  Waiting& operator=(const Waiting&) = delete;

  void is_long() {
    long_ = true;
    fabric_.tell_waits(rank_);
  }

 private:
  HostFabric::Shared& fabric_;
  int rank_;
  bool long_ = false;
};

}  // namespace

HostChannel::HostChannel(std::shared_ptr<HostFabric::Shared> shared, Party ends, std::string label,
                         int from, std::vector<int> ranks, Layout bundle, int ring, Mode how,
                         Memory whose)
    : Channel(std::move(label), from, std::move(ranks), std::move(bundle), ring,
              how == Mode::kAuto ? Mode::kCopy : how),
      shared_(std::move(shared)),
      ends_(std::move(ends)) {
  if (!ends_.here()) return;
  const std::size_t count = receivers().size();
  const std::size_t counts = sizeof(HostSenderCounts) + count * sizeof(HostReceiverCounts);
  const std::size_t all_slots = count * static_cast<std::size_t>(slots());
  head_nbytes_ = round_up(counts + (shared_->links ? all_slots * sizeof *due_ : 0));
  const std::size_t nbytes = head_nbytes_ + all_slots * layout().nbytes;
  if (whose == Memory::kOwn) {
    ends_.together("make a mailbox", [&] { memory_ = allocate_host(nbytes); });
  } else {
    memory_ = shared_->allocate(ends_, shared_->processes.owner(sender()), nbytes);
  }
  sent_ = reinterpret_cast<HostSenderCounts*>(memory_.data);
  received_ = reinterpret_cast<HostReceiverCounts*>(memory_.data + sizeof(HostSenderCounts));
  if (shared_->links) due_ = reinterpret_cast<std::atomic<std::uint64_t>*>(memory_.data + counts);
  const std::lock_guard lock(shared_->mutex);
  auto& all = shared_->counts;
  all.erase(std::remove_if(all.begin(), all.end(), [](const auto& c) { return c.first.expired(); }),
            all.end());
  all.push_back({memory_.owner, {memory_.data, counts}});
}

void HostChannel::close() {
  if (closed_.load() || !ends_.here()) return;
  if (!shared_->closed.load()) agree_on_close(ends_, name());
  closed_.store(true);
  memory_ = {};
}

void HostChannel::check_open() const {
  if (closed_.load()) throw Error("channel '" + name() + "' is closed");
}

std::byte* HostChannel::start_of(std::size_t place, int slot) const {
  const std::size_t index =
      place * static_cast<std::size_t>(slots()) + static_cast<std::size_t>(slot);
  return memory_.data + head_nbytes_ + index * layout().nbytes;
}

Buffer HostChannel::slot(int receiver, int slot) {
  check_slot(slot);
  const std::size_t place = place_of(receiver);
  if (!ends_.here()) shared_->processes.check_mine(receiver);
  check_open();
  return {memory_.owner, start_of(place, slot), layout().nbytes, Buffer::kHost};
}

void HostChannel::check_end(int rank, int slot) const {
  check_slot(slot);
  shared_->processes.check_mine(rank);
  check_open();
  shared_->check();
}

void HostChannel::check_turn(int rank, int slot, std::uint64_t done, bool allowed,
                             const char* operation) {
  const std::uint64_t next = done % static_cast<std::uint64_t>(slots());
  if (allowed && next == static_cast<std::uint64_t>(slot)) return;
  const Incident incident{rank, -1, name(), slot, next, done, operation, -1};
  shared_->fail(allowed ? HostFailure::kSlotOrder : HostFailure::kCallOrder, incident);
  throw SlotOrderError(incident, allowed ? OutOfTurn::kSlot : OutOfTurn::kCall);
}

void HostChannel::wait(const std::atomic<std::uint64_t>& count, std::uint64_t needed,
                       Incident incident) {
  const auto there = [&] {
    // Also across a wrap of the count.
    return static_cast<std::int64_t>(count.load(std::memory_order_acquire) - needed) >= 0;
  };
  if (there()) return;
  const Processes& processes = shared_->processes;
  const auto done = [&] {
    return there() || shared_->failed() || shared_->closed.load() || processes.over() ||
           gone(incident.peer);
  };
  const auto limit = std::chrono::duration<double>(shared_->deadline);
  const auto deadline = std::chrono::steady_clock::now() + limit_of(limit);
  Waiting waiting(*shared_, incident.rank, incident.peer);
  Signal& changed = shared_->control->changed;
  if (processes.hosts() > 1 && !changed.wait(done, deadline - limit_of(limit * kLong))) {
    waiting.is_long();
  }
  const bool in_time = changed.wait(done, deadline);
  if (there()) return;
  shared_->check();
  if (!in_time) {
    incident.expected = needed;
    incident.seen = count.load(std::memory_order_acquire);
    incident.straggler = shared_->straggler_from(incident.peer);
    shared_->fail(HostFailure::kTimeout, incident);
    throw ExchangeTimeout(incident, shared_->deadline);
  }
  processes.lost_because_left(incident.peer);
  shared_->check();
}

void HostChannel::sent_by_link(std::size_t place, int slot, std::uint64_t left) {
  std::atomic<std::uint64_t>& noted = due(place, slot);
  noted.store(std::max(noted.load(std::memory_order_relaxed), left), std::memory_order_relaxed);
}

void HostChannel::wait_for_arrival(std::size_t place, int slot,
                                   std::chrono::steady_clock::time_point begun, Incident incident) {
  const std::uint64_t arrival = due(place, slot).load(std::memory_order_relaxed);
  const auto there = [&] { return HostLinks::now() >= arrival; };
  const auto done = [&] { return there() || shared_->failed() || shared_->closed.load(); };
  const auto deadline = begun + limit_of(std::chrono::duration<double>(shared_->deadline));
  // A futex wakes up late, by some 60 us: the rest is spent looking.
  const auto early = HostLinks::time(arrival) - kWakes;
  Signal& changed = shared_->control->changed;
  if (!changed.wait(done, std::min(early, deadline)) && early < deadline) {
    while (!done()) {
    }
  }
  if (there()) return;
  shared_->check();
  incident.seen = incident.expected - 1;
  incident.straggler = incident.peer;
  shared_->fail(HostFailure::kTimeout, incident);
  throw ExchangeTimeout(incident, shared_->deadline);
}

void HostChannel::begin(int slot, Stream) {
  const nvtx::Range range("begin", *this, sender(), slot);
  check_end(sender(), slot);
  const std::uint64_t done = sent_->begun.load(std::memory_order_relaxed);
  const bool allowed = done == sent_->committed.load(std::memory_order_relaxed);
  check_turn(sender(), slot, done, allowed, "begin");
  const std::uint64_t epoch = done + 1;
  const auto ring = static_cast<std::uint64_t>(slots());
  const std::uint64_t needed = epoch - ring;
  for (std::size_t i = 0; i < receivers().size(); ++i) {
    wait(received_[i].released, needed,
         {sender(), receivers()[i], name(), slot, 0, 0, "begin", -1});
  }
  for (std::size_t i = 0; due_ != nullptr && i < receivers().size(); ++i) due(i, slot).store(0);
  // Only now: a begin whose wait was interrupted was none.
  sent_->begun.store(epoch, std::memory_order_relaxed);
}

void HostChannel::push(std::size_t index, const void* data, int slot, Stream) {
  const nvtx::Range range("push", *this, sender(), slot);
  check_tensor(index, data);
  check_end(sender(), slot);
  const std::uint64_t done = sent_->committed.load(std::memory_order_relaxed);
  const bool allowed = sent_->begun.load(std::memory_order_relaxed) == done + 1;
  check_turn(sender(), slot, done, allowed, "push");
  const std::size_t nbytes = layout().specs[index].nbytes;
  if (nbytes == 0) return;
  for (std::size_t i = 0; i < receivers().size(); ++i) {
    if (shared_->links) {
      sent_by_link(i, slot, shared_->links->send(sender(), receivers()[i], nbytes));
    }
    std::memcpy(start_of(i, slot) + layout().offsets[index], data, nbytes);
  }
}

void HostChannel::commit(int slot, Stream) {
  const nvtx::Range range("commit", *this, sender(), slot);
  check_end(sender(), slot);
  const std::uint64_t done = sent_->committed.load(std::memory_order_relaxed);
  const bool allowed = done != sent_->begun.load(std::memory_order_relaxed);
  check_turn(sender(), slot, done, allowed, "commit");
  for (std::size_t i = 0; shared_->links && i < receivers().size(); ++i) {
    sent_by_link(i, slot, HostLinks::now());  // where it has no bytes, or they have left before
    due(i, slot).fetch_add(shared_->links->link().latency());
  }
  sent_->committed.store(done + 1, std::memory_order_release);
  shared_->control->changed.notify();
}

void HostChannel::get(int receiver, int slot, Stream) {
  const nvtx::Range range("get", *this, receiver, slot);
  const std::size_t place = place_of(receiver);
  check_end(receiver, slot);
  HostReceiverCounts& mine = received_[place];
  const std::uint64_t done = mine.got.load(std::memory_order_relaxed);
  check_turn(receiver, slot, done, true, "get");
  const Incident incident{receiver, sender(), name(), slot, done + 1, 0, "get", -1};
  const auto begun = std::chrono::steady_clock::now();
  wait(sent_->committed, done + 1, incident);
  if (shared_->links) wait_for_arrival(place, slot, begun, incident);
  mine.got.store(done + 1, std::memory_order_relaxed);  // after the wait, as in begin
}

void HostChannel::release(int receiver, int slot, Stream) {
  const nvtx::Range range("release", *this, receiver, slot);
  const std::size_t place = place_of(receiver);
  check_end(receiver, slot);
  HostReceiverCounts& mine = received_[place];
  const std::uint64_t done = mine.released.load(std::memory_order_relaxed);
  const bool allowed = done != mine.got.load(std::memory_order_relaxed);
  check_turn(receiver, slot, done, allowed, "release");
  mine.released.store(done + 1, std::memory_order_release);
  shared_->control->changed.notify();
}

}  // namespace asyncdiff
