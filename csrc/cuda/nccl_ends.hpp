// The two ends of a channel between hosts, as the courier sees them.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "asyncdiff/channel_device.hpp"
#include "asyncdiff/errors.hpp"
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

// A bundle goes as one message once it is committed; before that, so much of it as is packed
// already if that is as large as this: most of it is then on its way while the rest is still
// computed. Few and large ones, because each takes the courier tens of microseconds.
constexpr std::size_t kPieceBytes = std::size_t{4} << 20;

// What both have.
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
  std::vector<std::uint64_t*> counts;  // all words in host memory that kernels count in
  std::uint64_t* carried;              // messages since the last reset, set by the link
  std::uint64_t messages = 0;          // given to it
  std::uint64_t bundles = 0;           // given to it as a whole
  std::size_t part = 0;                // bytes of the next bundle that were
  std::uint64_t first = 0;             // bundles, as of the last reset
  // By slot: messages that were given when the last bundle in it was whole.
  std::vector<std::uint64_t> last;

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
  bool idle() const { return load_word(carried) == messages; }
  // The oldest bundle that is not carried as a whole is not known: messages may be parts. It is one
  // of the last.
  ExchangeTimeout timeout(const char* operation, double deadline) const {
    const std::uint64_t n = part > 0 ? bundles + 1 : bundles;
    return {{rank, peer, name, slot(n), n, n - 1, operation, peer}, deadline};
  }
  // The next bundle was given to the link up to this byte.
  void gave(std::size_t to, bool whole) {
    if (idle()) since = std::chrono::steady_clock::now();
    ++messages;
    part = whole ? 0 : to;
    if (!whole) return;
    ++bundles;
    last.resize(static_cast<std::size_t>(slots));
    last[static_cast<std::size_t>(slot(bundles))] = messages;
  }
  // Whether the n-th bundle was carried as a whole; of older ones than there are slots it was.
  bool has_carried(std::uint64_t n) const {
    if (!reached(bundles, n)) return false;
    if (n == first || bundles - n >= static_cast<std::uint64_t>(slots)) return true;
    return reached(load_word(carried), last[static_cast<std::size_t>(slot(n))]);
  }
  void reset(std::uint64_t to) {
    for (std::uint64_t* word : counts) store_word(word, to);
    bundles = first = to;
    messages = seen = 0;
    part = 0;
    store_word(carried, 0);
  }
};

struct NcclOutgoing : NcclEnd {
  const std::byte* staging;        // slots in which bundles are packed
  const std::uint64_t* committed;  // by the sender's kernels: `flags` words, each on its line
  int flags;
  // By the sender's kernels: in which bundle each tensor was pushed last. Where each ends in a
  // slot.
  const std::uint64_t* pushed;
  std::vector<std::size_t> ends;
  std::size_t tensor = 0;  // of the next bundle, the first that is not packed
  std::uint64_t* credit;   // for the sender's kernels: what the receiver has released

  // Whether the n-th bundle is packed.
  bool is_committed(std::uint64_t n) const {
    for (int i = 0; i < flags; ++i) {
      if (!reached(load_word(committed + i * kFlagStride), n)) return false;
    }
    return true;
  }
  // Up to which byte of the next bundle there is something to give to the link, and whether that is
  // all of it. False where there is nothing, yet.
  bool next(std::size_t& to, bool& whole) {
    whole = is_committed(bundles + 1);
    to = whole ? nbytes : packed();
    return whole || to - part >= kPieceBytes;
  }

 private:
  // Up to which byte the next bundle is packed, which is not committed.
  std::size_t packed() {
    while (tensor < ends.size() &&
           (ends[tensor] == start_of(tensor) || load_word(pushed + tensor) == bundles + 1)) {
      ++tensor;
    }
    return start_of(tensor);
  }
  std::size_t start_of(std::size_t index) const { return index == 0 ? 0 : ends[index - 1]; }
};

struct NcclIncoming : NcclEnd {
  std::byte* mailbox;
  const std::uint64_t* released;  // by the receiver's kernels
  std::uint64_t* arrived;         // for the receiver's kernels, on their device
  std::uint64_t told = 0;         // released, as the sender knows it
};

}  // namespace asyncdiff
