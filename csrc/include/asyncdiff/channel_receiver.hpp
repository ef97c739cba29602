// What kernels do with a receiver's end: wait for a bundle, give its slot back. For device code
// only.
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
//     if (!__syncthreads_and(good)) return;                      // aborted, or too late
//     ... reads from.source + slot * from.slot_nbytes ...
//     asyncdiff::finish(from, true, bundle);                     // gives the slot back
//   }
//
// examples/cpp/fused_get.cu is one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "asyncdiff/channel_wait.hpp"

namespace asyncdiff {

// Starts a fused get, which with `release` gives the slot back at its end. False in all threads
// where this slot is not the next one, or (with `release`) one before it has still to be released.
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
// back. All threads call it. Where a thread has set bundle.go to false, nothing counts until the
// next reset.
__device__ inline void finish(const ReceiverDevice& receiver, bool release,
                              const BundleState& bundle) {
  __syncthreads();  // the block has read what it needs
  if (threadIdx.x != 0 || !bundle.go) return;
  ReceiverCounters& counters = *receiver.counters;
  if (ptx::add_one_acquire_release_device(&counters.finished) + 1 != gridDim.x) return;
  counters.finished = 0;
  counters.got = bundle.epoch;
  if (release) {
    counters.released = bundle.epoch;
    ptx::store_release_system(receiver.credit, bundle.epoch);
  }
}

}  // namespace asyncdiff
