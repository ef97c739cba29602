// How kernels wait, take turns and fail at a channel's end. For device code only.
//
// A kernel does not throw: it records the failure, returns, and Fabric::check() throws it. Whatever
// a failed kernel was to do is then not done, and the abort word is set before it ends: what comes
// after it in its stream finds it set.
#pragma once

#include <cstdint>

#include "asyncdiff/channel_device.hpp"
#include "asyncdiff/ptx.hpp"

namespace asyncdiff {

constexpr int kWarp = 32;

// Between two looks at the clock and at the abort word, which lies in host memory.
constexpr int kPolls = 256;

// What all threads of a block know of the bundle that they work on. In shared memory.
struct BundleState {
  std::uint64_t epoch;
  bool go;
};

// Records the first failure of an end and stops everybody. Several threads may fail at once: one of
// them writes the record, the others wait until it has.
__device__ inline void fail(const WaitContext& context, FailureKind kind, Operation operation,
                            int slot, std::uint64_t expected, std::uint64_t seen, int peer) {
  if (ptx::set_relaxed_device(context.claimed) == 0) {
    FailureRecord& record = *context.record;
    record.operation = static_cast<std::uint64_t>(operation);
    record.slot = static_cast<std::uint64_t>(slot);
    record.expected = expected;
    record.seen = seen;
    record.peer = peer;
    record.time = ptx::global_nanoseconds();
    ptx::store_release_system(&record.kind, static_cast<std::uint64_t>(kind));
  } else {
    const std::uint64_t begun = ptx::global_nanoseconds();
    while (ptx::load_relaxed_system(context.abort) == 0 &&
           ptx::global_nanoseconds() - begun <= context.deadline_ns) {
    }
  }
  ptx::store_release_system(context.abort, 1);
}

// Whether this operation comes in turn: `allowed` by those before it at this end, and on the right
// slot, `done` bundles having come before.
__device__ inline bool in_turn(const WaitContext& context, Operation operation, int slot,
                               std::uint64_t done, bool allowed, int slots) {
  const auto ring = static_cast<std::uint64_t>(slots);
  // A division would be on the way of every put.
  const std::uint64_t next = (ring & (ring - 1)) == 0 ? done & (ring - 1) : done % ring;
  if (allowed && next == static_cast<std::uint64_t>(slot)) return true;
  // After an abort the counters mean nothing any more.
  if (ptx::load_relaxed_system(context.abort) == 0) {
    const FailureKind kind = allowed ? FailureKind::kSlotOrder : FailureKind::kCallOrder;
    fail(context, kind, operation, slot, next, done, -1);
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

}  // namespace asyncdiff
