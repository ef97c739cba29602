// A channel between threads or processes: copies by the sender, waits on a futex.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "host_shared.hpp"

namespace asyncdiff {

class HostChannel : public Channel {
 public:
  // Whose memory mailboxes and counts are: that of all ends, or of this process alone, where
  // something else carries what changes.
  enum class Memory { kShared, kOwn };

  // Collective among the ends, where this process has one.
  HostChannel(std::shared_ptr<HostFabric::Shared> shared, Party ends, std::string name, int sender,
              std::vector<int> receivers, Layout layout, int slots, Mode mode,
              Memory memory = Memory::kShared);

  Buffer slot(int receiver, int slot) override;
  void begin(int slot, Stream stream) override;
  void push(std::size_t index, const void* data, int slot, Stream stream) override;
  void commit(int slot, Stream stream) override;
  void get(int receiver, int slot, Stream stream) override;
  void release(int receiver, int slot, Stream stream) override;
  void close() override;

  bool of(const HostFabric::Shared& fabric) const { return shared_.get() == &fabric; }

 protected:
  std::byte* start_of(std::size_t place, int slot) const;
  const Buffer& memory() const { return memory_; }
  HostSenderCounts& sent() const { return *sent_; }
  HostReceiverCounts& received(std::size_t place) const { return received_[place]; }
  // Whether the process of this rank has left, and all that it sent has come.
  virtual bool gone(int rank) const { return shared_->processes.left(rank); }

 private:
  // Throws unless this process owns the rank, all is open and nothing has failed.
  void check_end(int rank, int slot) const;
  void check_open() const;
  void check_turn(int rank, int slot, std::uint64_t done, bool allowed, const char* operation);
  void wait(const std::atomic<std::uint64_t>& count, std::uint64_t needed, Incident incident);
  // With a simulated link: notes when what was sent to a receiver will have left; and waits until
  // all of it has arrived, at most until the deadline of a wait that begun then.
  void sent_by_link(std::size_t place, int slot, std::uint64_t left);
  void wait_for_arrival(std::size_t place, int slot, std::chrono::steady_clock::time_point begun,
                        Incident incident);
  std::atomic<std::uint64_t>& due(std::size_t place, int slot) const {
    return due_[place * static_cast<std::size_t>(slots()) + static_cast<std::size_t>(slot)];
  }

  std::shared_ptr<HostFabric::Shared> shared_;
  Party ends_;
  std::atomic<bool> closed_{false};
  Buffer memory_;  // counts, times, then all slots of the first receiver, of the second, ...
  HostSenderCounts* sent_ = nullptr;
  HostReceiverCounts* received_ = nullptr;  // one for each receiver
  // With a simulated link: when the bundle in each slot has left, in nanoseconds, and once it is
  // committed when it arrives. By receiver and slot.
  std::atomic<std::uint64_t>* due_ = nullptr;
  std::size_t head_nbytes_ = 0;  // of all but the slots
};

}  // namespace asyncdiff
