// A channel whose ends are on several hosts: a channel to the receivers on the sender's host, and
// one to each of the others.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "asyncdiff/channel.hpp"
#include "asyncdiff/processes.hpp"

namespace asyncdiff {

// How often a fabric was reset.
using ResetCount = std::atomic<std::uint64_t>;

class SpanningChannel final : public Channel {
 public:
  // Those that this process has an end of: to the receivers on the sender's host (or null), and to
  // others.
  struct Parts {
    std::shared_ptr<Channel> local;
    std::vector<std::shared_ptr<Channel>> remote;
  };

  // On the host a put is begun, pushed and committed, part after part: its waits can be
  // interrupted. Elsewhere (`enqueues`) parts put by themselves. `fabric`: see of().
  SpanningChannel(std::shared_ptr<const ResetCount> fabric, Processes processes, Parts parts,
                  bool enqueues, std::string name, int sender, std::vector<int> receivers,
                  Layout layout, int slots);

  Buffer slot(int receiver, int slot) override;
  void begin(int slot, Stream stream) override;
  void push(std::size_t index, const void* data, int slot, Stream stream) override;
  void commit(int slot, Stream stream) override;
  void put(const std::vector<const void*>& tensors, int slot, Stream stream) override;
  void get(int receiver, int slot, Stream stream) override;
  void wait_for(int receiver, std::uint64_t count) override;
  void wait_free(std::uint64_t count) override;
  void release(int receiver, int slot, Stream stream) override;
  void close() override;

  bool of(const std::shared_ptr<const ResetCount>& fabric) const { return fabric_ == fabric; }
  // Of the sender.
  const Parts& parts() const { return parts_; }
  void check_sender(int slot) const;

 private:
  std::vector<Channel*> all() const;
  // The one with this receiver's end.
  Channel& part_of(int receiver) const;

  std::shared_ptr<const ResetCount> fabric_;
  Processes processes_;
  Parts parts_;
  bool enqueues_;
  std::size_t begun_ = 0;          // parts, where a begin was interrupted,
  std::uint64_t interrupted_ = 0;  // after so many resets
};

}  // namespace asyncdiff
