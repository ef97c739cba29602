// When the simulated links of a host fabric are free, in memory that its processes share.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "asyncdiff/simulated_link.hpp"

namespace asyncdiff {

class HostLinks {
 public:
  using Clock = std::chrono::steady_clock;  // the same in all processes of a host

  static std::size_t nbytes(std::size_t ranks) { return ranks * ranks * sizeof(Free); }

  HostLinks(const SimulatedLink& link, std::size_t ranks, std::byte* memory)
      : link_(link), ranks_(ranks), free_(reinterpret_cast<Free*>(memory)) {}

  const SimulatedLink& link() const { return link_; }
  static std::uint64_t now() {
    return static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
            .count());
  }
  static Clock::time_point time(std::uint64_t ns) {
    return Clock::time_point(std::chrono::duration_cast<Clock::duration>(
        std::chrono::nanoseconds(static_cast<std::int64_t>(ns))));
  }

  // Has a piece leave as soon as the link is free. When it has left, in nanoseconds.
  std::uint64_t send(int from, int to, std::size_t nbytes) {
    Free& free = free_[place_of(static_cast<std::size_t>(from), static_cast<std::size_t>(to))];
    std::uint64_t seen = free.load(std::memory_order_relaxed);
    std::uint64_t left = 0;
    do {
      left = std::max(seen, now()) + link_.time_of(nbytes);
    } while (!free.compare_exchange_weak(seen, left, std::memory_order_relaxed));
    return left;
  }

  void reset() {
    for (std::size_t i = 0; i < ranks_ * ranks_; ++i) free_[i].store(0, std::memory_order_relaxed);
  }

 private:
  using Free = std::atomic<std::uint64_t>;

  std::size_t place_of(std::size_t from, std::size_t to) const {
    if (link_.sharing == SimulatedLink::Sharing::kAll) return 0;
    if (link_.sharing == SimulatedLink::Sharing::kBoth && from > to) std::swap(from, to);
    return from * ranks_ + to;
  }

  SimulatedLink link_;
  std::size_t ranks_;
  Free* free_;
};

}  // namespace asyncdiff
