// A word that threads and processes wait on: a futex, with a deadline.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <ctime>

namespace asyncdiff {

// Lies in memory that all waiters share. Safe against a process that dies while it waits or
// notifies: there is no lock to be left behind.
class alignas(128) Signal {
 public:
  void notify() {
    sequence_.fetch_add(1, std::memory_order_seq_cst);
    if (waiters_.load(std::memory_order_seq_cst) != 0) {
      syscall(SYS_futex, &sequence_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
  }

  // Returns whether `done()` became true before the deadline. Whoever makes it true calls notify().
  template <class Done>
  bool wait(Done&& done, std::chrono::steady_clock::time_point deadline) {
    for (int i = 0; i < kSpins; ++i) {
      if (done()) return true;
      __builtin_ia32_pause();
    }
    waiters_.fetch_add(1, std::memory_order_seq_cst);
    bool in_time = true;
    while (true) {
      const std::uint32_t seen = sequence_.load(std::memory_order_seq_cst);
      if (done()) break;
      const auto left = deadline - std::chrono::steady_clock::now();
      if (left <= left.zero()) {
        in_time = false;
        break;
      }
      const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(left).count();
      const timespec limit{static_cast<time_t>(ns / 1'000'000'000),
                           static_cast<long>(ns % 1'000'000'000)};
      syscall(SYS_futex, &sequence_, FUTEX_WAIT, seen, &limit, nullptr, 0);
    }
    waiters_.fetch_sub(1, std::memory_order_seq_cst);
    return in_time;
  }

 private:
  static constexpr int kSpins = 100;

  std::atomic<std::uint32_t> sequence_{0};
  std::atomic<std::uint32_t> waiters_{0};
};

}  // namespace asyncdiff
