// The thread that carries committed bundles to other hosts.
//
// A send and a receive of NCCL are kernels that wait for each other, and keep multiprocessors and
// everybody who synchronizes with the device waiting meanwhile. So neither is enqueued before both
// can be: kernels of the sender pack a bundle and commit it, as on one host; the courier sees that
// and says so to the receiver's courier, over a connection of their own, and both enqueue their
// part at once. As on one host, a bundle is in its mailbox whether anybody asks for it or not, and
// the sender may begin the next one once its slot was released.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "failure_log.hpp"
#include "frames.hpp"
#include "nccl_ends.hpp"

namespace asyncdiff {

struct NcclMessage;

class NcclCourier {
 public:
  struct Events {
    std::function<void()> starting;  // by the thread, first
    // Whether nothing goes on any more, because a process has gone.
    std::function<bool()> over;
    // What it means that the connection to a process has ended.
    std::function<std::exception_ptr(int process)> lost;
    // By the thread, once, after the first failure, whoever told it: the links are to be aborted.
    std::function<void()> failed;
  };

  // connections[p] leads to process p.
  NcclCourier(std::map<int, Wire> connections, FailureLog& failures, double deadline_seconds,
              Events events);
  ~NcclCourier();
  NcclCourier(const NcclCourier&) = delete;
  NcclCourier& operator=(const NcclCourier&) = delete;
  void start();
  // Ends the thread, lets go of all ends, and says goodbye to the other couriers.
  void stop();
  // In a forked child, where the thread is not.
  void forget();

  // Before both sides have done it, neither may commit.
  void add(std::shared_ptr<NcclOutgoing> end);
  void add(std::shared_ptr<NcclIncoming> end);
  // Nothing of it may be under way.
  void remove(const NcclEnd& end);

  // Looks at everything now, and often for a while: something was or will be enqueued.
  void wake();

  // Waits until all that was committed, and what was to go before, has been carried; in how many
  // messages.
  std::uint64_t wait_until_sent(NcclOutgoing& end);
  // Waits until so many have arrived. Both throw what has failed meanwhile, or ExchangeTimeout.
  void wait_until_arrived(const NcclIncoming& end, std::uint64_t messages);
  // Waits until so many bundles since the last reset are in the mailbox. Throws as these do; a
  // timeout is told to all, as one of a kernel is.
  void wait_for(const NcclIncoming& end, std::uint64_t bundles);
  // Waits until the slot of the n-th bundle since the last reset was released, likewise.
  void wait_free(const NcclOutgoing& end, std::uint64_t n);
  // All counts, those of kernels in host memory included, become `first`, and what is still on its
  // way from before counts no more. Nothing may be under way; nobody may commit or release before
  // all processes have done it.
  void reset(std::uint64_t first);

  // What failed first in here; null where nothing has, or where it was told elsewhere.
  std::exception_ptr error() const;

 private:
  struct Peer {
    explicit Peer(Wire connection) : wire(std::move(connection)) {}
    Wire wire;
    bool open = true;
    bool left = false;
    bool speaks = true;  // may have something to read
  };
  using Clock = std::chrono::steady_clock;

  void run();
  // Whether there was something to do.
  bool work();
  bool post(NcclOutgoing& end);
  bool tell(NcclIncoming& end);
  bool listen(int process, Peer& peer);
  void heard(int process, const Frame& frame);
  // The n-th bundle is on its way, up to a byte or as a whole.
  void arriving(NcclIncoming& end, std::uint64_t n, std::uint64_t to, bool whole);
  void watch(NcclEnd& end, const char* operation, Clock::time_point now, bool look);
  void say(int process, char kind, const NcclMessage& message);
  void write(int process, Peer& peer);
  void ended(int process, Peer& peer);
  void fail(const std::exception_ptr& error);
  // Why NCCL may have failed: null where that is told elsewhere.
  std::exception_ptr cause_of(const std::exception_ptr& error);
  void look_again();
  // Waits for a while, or until there is something to do. Whether somebody woke it.
  bool pause(bool busy);
  void wait(const std::function<bool()>& done, const std::function<ExchangeTimeout()>& late);
  void wait_and_tell(const std::function<bool()>& done,
                     const std::function<ExchangeTimeout()>& late);

  FailureLog& failures_;
  double deadline_;
  Events events_;
  int wake_;  // an event descriptor
  std::atomic<bool> stop_{false};
  std::thread* thread_ = nullptr;

  mutable std::mutex mutex_;  // guards all below
  std::map<int, Peer> peers_;
  std::map<std::uint32_t, std::shared_ptr<NcclOutgoing>> outgoing_;
  std::map<std::pair<int, std::uint32_t>, std::shared_ptr<NcclIncoming>> incoming_;
  std::uint64_t generation_ = 0;  // of resets
  Clock::time_point looked_{};    // at the links

  mutable std::mutex error_mutex_;  // guards error_
  std::exception_ptr error_;
};

}  // namespace asyncdiff
