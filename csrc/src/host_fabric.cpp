#include "asyncdiff/host_fabric.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <utility>

namespace asyncdiff {

// Counters of one channel, guarded by the fabric's mutex. Bundles are counted from one.
struct Counters {
  std::uint64_t begun = 0;
  std::uint64_t committed = 0;
  std::vector<std::uint64_t> got;
  std::vector<std::uint64_t> released;
};

struct HostFabric::Shared {
  double deadline = 0;
  std::mutex mutex;
  std::condition_variable changed;
  std::exception_ptr failure;
  std::vector<std::weak_ptr<Counters>> counters;
  bool closed = false;

  // Both with the mutex held.
  void fail(std::exception_ptr error) {
    if (!failure) failure = std::move(error);
    changed.notify_all();
  }
  void check() const {
    if (closed) throw Error("the fabric is closed");
    if (failure) std::rethrow_exception(failure);
  }
};

namespace {

class HostChannel final : public Channel {
 public:
  HostChannel(std::shared_ptr<HostFabric::Shared> shared, std::string name, int sender,
              std::vector<int> receivers, Layout layout, int slots)
      : Channel(std::move(name), sender, std::move(receivers), std::move(layout), slots),
        shared_(std::move(shared)),
        counters_(std::make_shared<Counters>()) {
    counters_->got.resize(this->receivers().size());
    counters_->released.resize(this->receivers().size());
    const std::size_t count = this->receivers().size() * static_cast<std::size_t>(slots);
    for (std::size_t i = 0; i < count; ++i) {
      memory_.push_back(allocate_host(this->layout().nbytes));
    }
    const std::lock_guard lock(shared_->mutex);
    shared_->counters.push_back(counters_);
  }

  Buffer slot(int receiver, int slot) override {
    check_slot(slot);
    return memory(place_of(receiver), slot);
  }

  void begin(int slot, Stream) override {
    check_slot(slot);
    std::unique_lock lock(shared_->mutex);
    shared_->check();
    if (counters_->begun != counters_->committed) {
      out_of_order(sender(), slot, counters_->committed, "begin");
    }
    check_turn(sender(), slot, counters_->begun, "begin");
    const std::uint64_t epoch = ++counters_->begun;
    const auto needed = epoch > slots_u() ? epoch - slots_u() : 0;
    for (std::size_t i = 0; i < receivers().size(); ++i) {
      wait(lock, counters_->released[i], needed,
           {sender(), receivers()[i], name(), slot, 0, 0, "begin"});
    }
  }

  void push(std::size_t index, const void* data, int slot, Stream) override {
    check_slot(slot);
    check_index(index);
    {
      const std::lock_guard lock(shared_->mutex);
      shared_->check();
      if (counters_->begun != counters_->committed + 1) {
        out_of_order(sender(), slot, counters_->begun, "push");
      }
      check_turn(sender(), slot, counters_->committed, "push");
    }
    const TensorSpec& spec = layout().specs[index];
    if (spec.nbytes == 0) return;
    for (std::size_t i = 0; i < receivers().size(); ++i) {
      std::memcpy(memory(i, slot).data + layout().offsets[index], data, spec.nbytes);
    }
  }

  void commit(int slot, Stream) override {
    check_slot(slot);
    const std::lock_guard lock(shared_->mutex);
    shared_->check();
    if (counters_->committed >= counters_->begun) {
      out_of_order(sender(), slot, counters_->committed, "commit");
    }
    check_turn(sender(), slot, counters_->committed, "commit");
    ++counters_->committed;
    shared_->changed.notify_all();
  }

  void get(int receiver, int slot, Stream) override {
    check_slot(slot);
    const std::size_t place = place_of(receiver);
    std::unique_lock lock(shared_->mutex);
    shared_->check();
    check_turn(receiver, slot, counters_->got[place], "get");
    const std::uint64_t epoch = ++counters_->got[place];
    wait(lock, counters_->committed, epoch, {receiver, sender(), name(), slot, 0, 0, "get"});
  }

  void release(int receiver, int slot, Stream) override {
    check_slot(slot);
    const std::size_t place = place_of(receiver);
    const std::lock_guard lock(shared_->mutex);
    shared_->check();
    if (counters_->released[place] >= counters_->got[place]) {
      out_of_order(receiver, slot, counters_->released[place], "release");
    }
    check_turn(receiver, slot, counters_->released[place], "release");
    ++counters_->released[place];
    shared_->changed.notify_all();
  }

 private:
  std::uint64_t slots_u() const { return static_cast<std::uint64_t>(slots()); }

  const Buffer& memory(std::size_t place, int slot) const {
    return memory_[place * static_cast<std::size_t>(slots()) + static_cast<std::size_t>(slot)];
  }

  [[noreturn]] void out_of_order(int rank, int slot, std::uint64_t done, const char* operation) {
    const SlotOrderError error({rank, -1, name(), slot, done % slots_u(), done, operation});
    shared_->fail(std::make_exception_ptr(error));
    throw error;
  }

  void check_turn(int rank, int slot, std::uint64_t done, const char* operation) {
    if (done % slots_u() != static_cast<std::uint64_t>(slot)) {
      out_of_order(rank, slot, done, operation);
    }
  }

  void wait(std::unique_lock<std::mutex>& lock, const std::uint64_t& count, std::uint64_t needed,
            Incident incident) {
    const auto limit = std::chrono::duration<double>(shared_->deadline);
    const bool in_time = shared_->changed.wait_for(lock, limit, [&] {
      return count >= needed || shared_->failure != nullptr || shared_->closed;
    });
    if (count >= needed) return;
    shared_->check();
    if (!in_time) {
      incident.expected = needed;
      incident.seen = count;
      const ExchangeTimeout error(incident, shared_->deadline);
      shared_->fail(std::make_exception_ptr(error));
      throw error;
    }
  }

  std::shared_ptr<HostFabric::Shared> shared_;
  std::shared_ptr<Counters> counters_;
  std::vector<Buffer> memory_;
};

}  // namespace

HostFabric::HostFabric(int ranks, double deadline_seconds)
    : Fabric(ranks, deadline_seconds), shared_(std::make_shared<Shared>()) {
  shared_->deadline = deadline();
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
  {
    const std::lock_guard lock(shared_->mutex);
    if (shared_->closed) throw Error("the fabric is closed");
  }
  return std::make_shared<HostChannel>(shared_, name, sender, receivers, layout, slots);
}

void HostFabric::abort(int rank, const std::string& reason) {
  const std::lock_guard lock(shared_->mutex);
  shared_->fail(std::make_exception_ptr(Aborted(rank, reason)));
}

void HostFabric::check() {
  const std::lock_guard lock(shared_->mutex);
  shared_->check();
}

void HostFabric::reset() {
  const std::lock_guard lock(shared_->mutex);
  if (shared_->closed) throw Error("the fabric is closed");
  shared_->failure = nullptr;
  auto& all = shared_->counters;
  all.erase(std::remove_if(all.begin(), all.end(), [](const auto& c) { return c.expired(); }),
            all.end());
  for (const auto& weak : all) {
    if (const auto counters = weak.lock()) {
      counters->begun = counters->committed = 0;
      std::fill(counters->got.begin(), counters->got.end(), 0);
      std::fill(counters->released.begin(), counters->released.end(), 0);
    }
  }
}

void HostFabric::close() {
  const std::lock_guard lock(shared_->mutex);
  shared_->closed = true;
  shared_->changed.notify_all();
}

}  // namespace asyncdiff
