// What the channels of a network over NCCL share with it, and outlive it with.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/memory.hpp"
#include "asyncdiff/processes.hpp"
#include "failure_log.hpp"
#include "flag_pool.hpp"
#include "lent_memory.hpp"
#include "nccl_courier.hpp"
#include "nccl_cuda_link.hpp"
#include "nccl_ends.hpp"

namespace asyncdiff {

// What an end of a channel has of this process. Kept until the channel is closed, or the network:
// the other side may send as long as it has not been told.
struct NcclEndMemory {
  Buffer device;                           // lines of the end's kernels, then all slots
  std::size_t lines;                       // bytes of them
  std::vector<std::size_t> device_counts;  // where in the lines bundles are counted
  std::size_t first, words;                // lines in pinned memory
  const FailureRecord* record;
  std::shared_ptr<NcclEnd> end;

  // All counts of kernels on the device become `count`. Nothing may be in flight.
  void reset(std::uint64_t count) const;
};

class NcclShared {
 public:
  // Collective.
  NcclShared(const Processes& processes, std::vector<int> devices, double deadline_seconds,
             std::map<int, Wire> connections);
  ~NcclShared();
  NcclShared(const NcclShared&) = delete;
  NcclShared& operator=(const NcclShared&) = delete;

  const Processes& processes() const { return processes_; }
  int device(int rank) const { return devices_[static_cast<std::size_t>(rank)]; }
  NcclCourier& courier() { return courier_; }
  FailureLog& failures() { return failures_; }
  LentMemory& lent() { return lent_; }
  // Held while channels are made or closed, and while the network is reset or closed.
  std::mutex& calls() { return calls_; }

  bool closed() const { return closed_; }
  void check_open() const;
  // Throws the first failure, if there was one.
  void check() const;
  // Waits for what the courier carries; throws what has failed meanwhile.
  void wait(const std::function<void(NcclCourier&)>& until);
  void abort(int rank, const std::string& reason);
  void on_failure(std::function<void(int, const std::string&)> tell);

  // All below under calls().

  // The link between two ranks, made when it is first asked for. Collective among `ends`.
  std::shared_ptr<NcclLink> link(int sender, int receiver, const Party& ends);
  // The number of a channel whose sender is here.
  std::uint32_t next_channel() { return channels_++; }
  // Lines in pinned memory, and where they are.
  std::uint64_t* take_words(std::size_t count, std::size_t& first);
  void keep(std::shared_ptr<NcclEndMemory> end) { ends_.push_back(std::move(end)); }
  void give_back(const NcclEndMemory& end);

  // Waits until the devices of own ranks have done what was enqueued.
  void settle();
  void reset(std::uint64_t first);
  void close();

 private:
  NcclLimits limits(double seconds) const;
  std::exception_ptr lost(int process) const;
  void failed();
  void abort_links() noexcept;
  template <class End, class Work>
  void for_each_end(Work work) const;

  Processes processes_;
  std::vector<int> devices_;
  double deadline_;
  Buffer pinned_;  // lines, then the failure log
  FailureLog failures_;
  FlagPool lines_;
  LentMemory lent_;  // slots
  std::vector<std::shared_ptr<NcclEndMemory>> ends_;
  std::uint32_t channels_ = 0;
  std::mutex calls_;
  std::atomic<bool> closed_{false};
  std::atomic<bool> aborted_by_caller_{false};

  std::mutex links_mutex_;  // guards links_
  std::map<std::pair<int, int>, std::shared_ptr<NcclCudaLink>> links_;
  std::mutex tell_mutex_;  // guards tell_
  std::function<void(int, const std::string&)> tell_;
  NcclCourier courier_;  // last: its thread uses all above
};

}  // namespace asyncdiff
