// What kernels do with a channel's end: take turns, wait, signal. For device code only.
//
// A kernel that consumes a bundle itself, in place of get, a kernel and release (flagged protocol):
//
//   // Any number of blocks, each of at least from.flags threads (up to 32).
//   __global__ void mine(asyncdiff::ReceiverDevice from, int slot, ...) {
//     __shared__ asyncdiff::BundleState bundle;
//     if (!asyncdiff::start(from, slot, true, bundle)) return;   // all threads call it
//     bool good = true;
//     if (threadIdx.x < from.flags)
//       good = asyncdiff::wait_for_flag(from, slot, bundle.epoch, threadIdx.x);
//     if (!__syncthreads_and(good)) return;                    // aborted, or too late
//     ... reads from.source + slot * from.slot_nbytes ...
//     asyncdiff::finish(from, true, bundle);                     // gives the slot back
//   }
//
// unpack_kernel in get.cu is one, for both protocols. A kernel does not throw: it records the
// failure, returns, and Fabric::check() throws it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "asyncdiff/channel_device.hpp"
#include "asyncdiff/ptx.hpp"

namespace asyncdiff {

// Between two looks at the clock and at the abort word, which lies in host memory.
constexpr int kPolls = 256;

// Records the first failure of an end and stops everybody.
__device__ inline void fail(const WaitContext& context, FailureKind kind, Operation operation,
                            int slot, std::uint64_t expected, std::uint64_t seen, int peer) {
  FailureRecord& record = *context.record;
  if (ptx::load_relaxed_system(&record.kind) == 0) {
    record.operation = static_cast<std::uint64_t>(operation);
    record.slot = static_cast<std::uint64_t>(slot);
    record.expected = expected;
    record.seen = seen;
    record.peer = peer;
    record.time = ptx::global_nanoseconds();
    ptx::store_release_system(&record.kind, static_cast<std::uint64_t>(kind));
  }
  ptx::store_release_system(context.abort, 1);
}

// Whether this operation is on the right slot: `done` bundles came before it.
__device__ inline bool in_turn(const WaitContext& context, Operation operation, int slot,
                               std::uint64_t done, bool allowed, int slots) {
  const auto ring = static_cast<std::uint64_t>(slots);
  // A division would be on the way of every put.
  const std::uint64_t next = (ring & (ring - 1)) == 0 ? done & (ring - 1) : done % ring;
  if (allowed && next == static_cast<std::uint64_t>(slot)) return true;
  // After an abort the counters mean nothing any more.
  if (ptx::load_relaxed_system(context.abort) == 0) {
    fail(context, FailureKind::kSlotOrder, operation, slot, next, done, -1);
  }
  return false;
}

// Waits until look() says so, at most until the deadline or an abort. look(seen) may set what it
// has seen, for the record. Looks at the abort word, in slow host memory, only after many polls.
template <class Look>
__device__ bool wait_until(const WaitContext& context, std::uint64_t needed, Operation operation,
                           int slot, int peer, Look look) {
  std::uint64_t seen = 0;
  if (look(seen)) return true;
  const std::uint64_t begun = ptx::global_nanoseconds();
  while (true) {
    for (int i = 0; i < kPolls; ++i) {
      if (look(seen)) return true;
    }
    const bool late = ptx::global_nanoseconds() - begun > context.deadline_ns;
    // After the clock: a kernel that was not run for a while may find what it waits for.
    if (ptx::load_relaxed_system(context.abort) != 0) return false;
    if (late) {
      if (look(seen)) return true;
      fail(context, FailureKind::kTimeout, operation, slot, needed, seen, peer);
      return false;
    }
  }
}

// Waits until *word has reached `needed`, also across a wrap of the count.
__device__ inline bool wait_for(const WaitContext& context, const std::uint64_t* word,
                                std::uint64_t needed, Operation operation, int slot, int peer) {
  return wait_until(context, needed, operation, slot, peer, [&](std::uint64_t& seen) {
    seen = ptx::load_acquire_system(word);
    return static_cast<std::int64_t>(seen - needed) >= 0;
  });
}

// --- the receiver's end

// What all threads of a block know of the bundle that they work on. In shared memory.
struct BundleState {
  std::uint64_t epoch;
  bool go;
};

// Starts a fused get, which with `release` gives the slot back at its end. False in all threads
// where this slot is not the next one, or one before it has still to be released.
__device__ inline bool start(const ReceiverDevice& receiver, int slot, bool release,
                             BundleState& bundle) {
  if (threadIdx.x == 0) {
    const ReceiverCounters& counters = *receiver.counters;
    // All blocks read them before the last of them, which is the one that changes them, is done.
    const bool allowed = !release || counters.released == counters.got;
    bundle.epoch = counters.got + 1;
    bundle.go =
        in_turn(receiver.context, Operation::kGet, slot, counters.got, allowed, receiver.slots);
  }
  __syncthreads();
  return bundle.go;
}

// One of the bundle's flags; a bundle is there when all of them are.
__device__ inline bool wait_for_flag(const ReceiverDevice& receiver, int slot, std::uint64_t epoch,
                                     int flag) {
  return wait_for(receiver.context, receiver.arrived + flag * kFlagStride, epoch, Operation::kGet,
                  slot, receiver.sender_rank);
}

// Inline: waits for the 8 bytes of a slot that begin at `at`, a multiple of 8, and for those of all
// lanes of the warp. All lanes call it, those with nothing to read with `wanted` false; one of them
// looks at the abort word and the clock. False in all lanes after a failure.
__device__ inline bool read_inline(const ReceiverDevice& receiver, int slot, std::uint64_t epoch,
                                   bool wanted, std::uint64_t at, std::uint64_t& value) {
  const std::byte* address = receiver.source + 2 * (receiver.slot_nbytes * slot + at);
  const auto tag = static_cast<std::uint32_t>(epoch);
  ptx::Words words{};
  std::uint32_t seen = 0;
  const auto look = [&] {
    if (!wanted) return true;
    words = ptx::load_words_relaxed_system(address);
    seen = static_cast<std::uint32_t>(words.first >> 32);
    return seen == tag && (words.second >> 32) == tag;
  };
  const std::uint64_t begun = ptx::global_nanoseconds();
  bool good = look();
  for (unsigned i = 1; __all_sync(~0u, good) == 0; ++i) {
    if (!good) good = look();
    if (i % kPolls != 0) continue;
    bool stop = false;
    const unsigned late = __ballot_sync(~0u, !good);
    if (late == 0) continue;
    if (threadIdx.x % warpSize == __ffs(static_cast<int>(late)) - 1) {
      const bool too_late = ptx::global_nanoseconds() - begun > receiver.context.deadline_ns;
      stop = ptx::load_relaxed_system(receiver.context.abort) != 0;
      if (!stop && too_late && !look()) {
        fail(receiver.context, FailureKind::kTimeout, Operation::kGet, slot, epoch, seen,
             receiver.sender_rank);
        stop = true;
      }
    }
    if (__any_sync(~0u, stop) != 0) return false;
  }
  value = (words.first & 0xffffffffu) | (words.second << 32);
  return true;
}

// Ends a fused get. The last block to come counts the bundle and, with `release`, gives the slot
// back. All threads call it.
__device__ inline void finish(const ReceiverDevice& receiver, bool release,
                              const BundleState& bundle) {
  __syncthreads();  // the block has read what it needs
  if (threadIdx.x != 0) return;
  ReceiverCounters& counters = *receiver.counters;
  if (ptx::add_one_acquire_release_device(&counters.finished) + 1 != gridDim.x) return;
  counters.finished = 0;
  counters.got = bundle.epoch;
  if (release) {
    counters.released = bundle.epoch;
    ptx::store_release_system(receiver.credit, bundle.epoch);
  }
}

// --- the sender's end

// A receiver's credit for each lane of one warp, looked at once before it is known which one is
// needed.
class Credit {
 public:
  __device__ explicit Credit(const SenderDevice& sender) {
    const auto lane = static_cast<int>(threadIdx.x);
    if (lane < sender.receivers) seen_ = ptx::load_acquire_system(sender.credits[lane]);
  }

  // Waits until every receiver has released what the slot of this epoch held before.
  __device__ bool wait(const SenderDevice& sender, std::uint64_t epoch, int slot) const {
    const auto lane = static_cast<int>(threadIdx.x);
    const std::uint64_t needed = epoch - static_cast<std::uint64_t>(sender.slots);
    bool good = true;
    if (lane < sender.receivers && static_cast<std::int64_t>(seen_ - needed) < 0) {
      good = wait_for(sender.context, sender.credits[lane], needed, Operation::kBegin, slot,
                      sender.ranks[lane]);
    }
    return __all_sync(~0u, good) != 0;
  }

 private:
  static_assert(kMaxReceivers <= 32, "a lane for each");
  std::uint64_t seen_ = 0;
};

// Inline: stores the 8 bytes of a slot that begin at `at`, a multiple of 8, to all receivers.
__device__ inline void write_inline(const SenderDevice& sender, int slot, std::uint64_t epoch,
                                    std::uint64_t at, std::uint64_t value) {
  const std::uint64_t tag = epoch << 32;
  const ptx::Words words{tag | (value & 0xffffffffu), tag | (value >> 32)};
  for (int t = 0; t < sender.targets; ++t) {
    ptx::store_words_relaxed_system(sender.target[t] + 2 * (sender.slot_nbytes * slot + at), words);
  }
}

}  // namespace asyncdiff
