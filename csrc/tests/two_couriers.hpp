// Couriers of two processes, in threads of one: kernels are played by the test, NCCL by a queue.
#pragma once

#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../cuda/nccl_courier.hpp"
#include "asyncdiff/errors.hpp"
#include "asyncdiff/memory.hpp"
#include "check.hpp"

namespace asyncdiff {

using Clock = std::chrono::steady_clock;

inline bool soon(const std::function<bool()>& so) {
  const auto limit = Clock::now() + std::chrono::seconds(20);
  while (Clock::now() < limit) {
    if (so()) return true;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  return false;
}

// Carries a message once both sides have enqueued their part.
class Queue {
 public:
  std::atomic<bool> broken{false}, stuck{false};
  std::atomic<int> aborts{0};

  void send(const std::byte* from, std::size_t nbytes, const Publication& then) {
    const std::lock_guard lock(mutex_);
    sends_.push_back({const_cast<std::byte*>(from), nbytes, then});
    carry();
  }
  void receive(std::byte* to, std::size_t nbytes, const Publication& then) {
    const std::lock_guard lock(mutex_);
    receives_.push_back({to, nbytes, then});
    carry();
  }
  std::size_t waiting() {
    const std::lock_guard lock(mutex_);
    return sends_.size() + receives_.size();
  }

 private:
  struct Part {
    std::byte* memory;
    std::size_t nbytes;
    Publication then;
  };
  static void publish(const Publication& then) {
    if (then.device != nullptr) store_word(then.device, then.bundle);
    store_word(then.host, then.message);
  }
  void carry() {
    while (!stuck && !sends_.empty() && !receives_.empty()) {
      CHECK(sends_.front().nbytes == receives_.front().nbytes);
      std::memcpy(receives_.front().memory, sends_.front().memory, sends_.front().nbytes);
      publish(receives_.front().then);
      publish(sends_.front().then);
      sends_.pop_front();
      receives_.pop_front();
    }
  }

  std::mutex mutex_;
  std::deque<Part> sends_, receives_;
};

class FakeLink final : public NcclLink {
 public:
  explicit FakeLink(std::shared_ptr<Queue> queue) : queue_(std::move(queue)) {}
  void send(const std::byte* from, std::size_t nbytes, const Publication& then) override {
    check();
    queue_->send(from, nbytes, then);
  }
  void receive(std::byte* to, std::size_t nbytes, const Publication& then) override {
    check();
    queue_->receive(to, nbytes, then);
  }
  void check() override {
    if (queue_->broken) throw NcclError("the cable is out");
  }
  void abort() noexcept override { ++queue_->aborts; }

 private:
  std::shared_ptr<Queue> queue_;
};

// One process.
struct Side {
  Side(int process, std::map<int, Wire> connections, double deadline)
      : failures(allocate_host(FailureLog::nbytes(1)), 0, 1, deadline),
        courier(
            std::move(connections), failures, deadline,
            {[] {}, [this] { return over.load(); },
             [](int which) { return std::make_exception_ptr(ProcessLost(which, {which}, "gone")); },
             [this] { ++failed; }}) {
    static_cast<void>(process);
    courier.start();
  }

  std::atomic<bool> over{false};
  std::atomic<int> failed{0};
  FailureLog failures;
  NcclCourier courier;
};

inline Wire wire_of(int descriptor, char mine, char theirs) {
  return Wire(Socket(descriptor), "a key", mine, theirs);
}

struct Two {
  explicit Two(double deadline = 10) {
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
    descriptor = ends[1];
    std::map<int, Wire> first, second;
    first.emplace(1, wire_of(ends[0], 'a', 'b'));
    second.emplace(0, wire_of(ends[1], 'b', 'a'));
    sides[0] = std::make_unique<Side>(0, std::move(first), deadline);
    sides[1] = std::make_unique<Side>(1, std::move(second), deadline);
  }
  std::unique_ptr<Side> sides[2];
  int descriptor;
};

// A channel, and what its kernels do.
struct TestChannel {
  static constexpr int kFlags = 3;

  TestChannel(Two& two, int sender, std::uint32_t number, int slots, std::size_t nbytes,
              std::shared_ptr<Queue> carried_by, std::vector<std::size_t> ends = {})
      : queue(std::move(carried_by)),
        staging(nbytes * static_cast<std::size_t>(slots)),
        mailbox(staging.size()),
        out(std::make_shared<NcclOutgoing>()),
        in(std::make_shared<NcclIncoming>()),
        both(two),
        from(sender) {
    const auto link = std::make_shared<FakeLink>(queue);
    for (NcclEnd* end : {static_cast<NcclEnd*>(out.get()), static_cast<NcclEnd*>(in.get())}) {
      end->channel = number;
      end->name = "up";
      end->link = link;
      end->nbytes = nbytes;
      end->slots = slots;
    }
    out->process = out->peer = 1 - sender;
    out->rank = in->process = in->peer = sender;
    in->rank = 1 - sender;
    out->committed = words;
    out->pushed = pushed;
    out->ends = std::move(ends);
    out->flags = kFlags;
    out->credit = &credit;
    out->carried = &sent;
    out->staging = staging.data();
    for (int i = 0; i < kFlags; ++i) out->counts.push_back(words + i * kFlagStride);
    for (std::uint64_t& word : pushed) out->counts.push_back(&word);
    in->counts = {&released};
    in->mailbox = mailbox.data();
    in->released = &released;
    in->arrived = &arrived;
    in->carried = &arrived_on_host;
    two.sides[sender]->courier.add(out);
    two.sides[1 - sender]->courier.add(in);
  }

  void commit(std::uint64_t n, int value) {
    std::memset(staging.data() + out->place(n), value, out->nbytes);
    for (int i = 0; i < kFlags; ++i) store_word(words + i * kFlagStride, n);
  }
  bool holds(std::uint64_t n, int value) const {
    for (std::size_t i = 0; i < in->nbytes; ++i) {
      if (mailbox[in->place(n) + i] != static_cast<std::byte>(value)) return false;
    }
    return true;
  }
  // Bundles first + 1 to first + count.
  void run(std::uint64_t first, int count) {
    const auto ring = static_cast<std::uint64_t>(out->slots);
    std::thread receiving([&] {
      for (int i = 1; i <= count; ++i) {
        const std::uint64_t n = first + static_cast<std::uint64_t>(i);
        CHECK(soon([&] { return reached(load_word(&arrived), n); }));
        CHECK(holds(n, i % 251));
        store_word(&released, n);
      }
    });
    for (int i = 1; i <= count; ++i) {
      const std::uint64_t n = first + static_cast<std::uint64_t>(i);
      CHECK(soon([&] { return reached(load_word(&credit), n - ring); }));
      commit(n, i % 251);
    }
    receiving.join();
  }
  std::uint64_t wait_until_all_arrived() const {
    const std::uint64_t count = both.sides[from]->courier.wait_until_sent(*out);
    both.sides[1 - from]->courier.wait_until_arrived(*in, count);
    return count;
  }

  std::shared_ptr<Queue> queue;
  std::vector<std::byte> staging, mailbox;
  alignas(128) std::uint64_t words[kFlags * kFlagStride] = {};
  std::uint64_t pushed[8] = {};
  std::uint64_t credit = 0, sent = 0, released = 0, arrived = 0, arrived_on_host = 0;
  std::shared_ptr<NcclOutgoing> out;
  std::shared_ptr<NcclIncoming> in;
  Two& both;
  int from;
};

}  // namespace asyncdiff
