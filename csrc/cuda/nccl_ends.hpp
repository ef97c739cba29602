// The two ends of a channel between hosts, as the courier sees them.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "asyncdiff/channel_device.hpp"
#include "nccl_link.hpp"

namespace asyncdiff {

// Words in host memory that kernels or the other side write, the courier too.
inline std::uint64_t load_word(const std::uint64_t* word) {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
inline void store_word(std::uint64_t* word, std::uint64_t value) {
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
}
// Whether a count has come so far, also across a wrap.
inline bool reached(std::uint64_t count, std::uint64_t needed) {
  return static_cast<std::int64_t>(count - needed) >= 0;
}

// What both have. Counts are of bundles since the last reset.
struct NcclEnd {
  virtual ~NcclEnd() = default;

  std::uint32_t channel;  // a number that the sender's process has given to it
  int process;            // on the other side
  std::string name;
  int rank;
  int peer;
  std::shared_ptr<NcclLink> link;
  std::size_t nbytes;
  int slots;
  std::uint64_t* carried;    // set by the link
  std::uint64_t posted = 0;  // given to the link

  // When the link last was idle or got something done, for the deadline.
  std::chrono::steady_clock::time_point since{};
  std::uint64_t seen = 0;

  // Bytes from the first slot to that of the n-th bundle, counted from one.
  std::size_t place(std::uint64_t n) const {
    return static_cast<std::size_t>((n - 1) % static_cast<std::uint64_t>(slots)) * nbytes;
  }
  int slot(std::uint64_t n) const {
    return static_cast<int>((n - 1) % static_cast<std::uint64_t>(slots));
  }
  bool idle() const { return load_word(carried) == posted; }
};

struct NcclOutgoing : NcclEnd {
  const std::byte* staging;        // slots in which bundles are packed
  const std::uint64_t* committed;  // by the sender's kernels: `flags` words, each on its line
  int flags;
  std::uint64_t* credit;  // for the sender's kernels: what the receiver has released

  // Whether the n-th bundle is packed.
  bool is_committed(std::uint64_t n) const {
    for (int i = 0; i < flags; ++i) {
      if (!reached(load_word(committed + i * kFlagStride), n)) return false;
    }
    return true;
  }
};

struct NcclIncoming : NcclEnd {
  std::byte* mailbox;
  const std::uint64_t* released;  // by the receiver's kernels
  std::uint64_t* arrived;         // for the receiver's kernels, on their device
  std::uint64_t told = 0;         // released, as the sender knows it
};

}  // namespace asyncdiff
