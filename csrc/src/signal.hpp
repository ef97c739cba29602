// A word that threads and processes wait on: a futex, with a deadline, and with interrupts.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <ctime>

#include "asyncdiff/interrupt.hpp"

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
  // Throws what check_interrupt() throws.
  template <class Done>
  bool wait(Done&& done, std::chrono::steady_clock::time_point deadline) {
    for (int i = 0; i < kSpins; ++i) {
      if (done()) return true;
      relax();
    }
    const Counted counted(waiters_);
    auto look = Clock::now() + kLooks;
    while (true) {
      const std::uint32_t seen = sequence_.load(std::memory_order_seq_cst);
      if (done()) return true;
      auto now = Clock::now();
      if (now >= look) {
        check_interrupt();
        now = Clock::now();
        look = now + kLooks;
      }
      if (now >= deadline) return false;
      const auto left = std::min(deadline, look) - now;
      const auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(left).count();
      const timespec limit{static_cast<time_t>(ns / 1'000'000'000),
                           static_cast<long>(ns % 1'000'000'000)};
      const bool woken = syscall(SYS_futex, &sequence_, FUTEX_WAIT, seen, &limit, nullptr, 0) == 0;
      if (!woken && errno == EINTR) look = Clock::time_point::min();
    }
  }

 private:
  using Clock = std::chrono::steady_clock;

  // One who waits, however the wait ends.
  class Counted {
   public:
    explicit Counted(std::atomic<std::uint32_t>& count) : count_(count) {
      count_.fetch_add(1, std::memory_order_seq_cst);
    }
    ~Counted() { count_.fetch_sub(1, std::memory_order_seq_cst); }
    Counted(const Counted&) = delete;
    Counted& operator=(const Counted&) = delete;

   private:
    std::atomic<std::uint32_t>& count_;
  };

  // Tells the processor that this is a loop that waits, where there is an instruction for it.
  static void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield" ::: "memory");
#endif
  }

  static constexpr int kSpins = 100;
  // Between two looks for an interrupt, whose signal another thread may have been given.
  static constexpr std::chrono::milliseconds kLooks{100};

  std::atomic<std::uint32_t> sequence_{0};
  std::atomic<std::uint32_t> waiters_{0};
};

}  // namespace asyncdiff
