// A channel's ends as seen from device code: where to wait and where to signal. What kernels do
// with them is in channel_wait.hpp, channel_sender.hpp and channel_receiver.hpp.
//
// Epochs count bundles, only grow between two resets, and live in device memory: kernels advance
// them, so graph replays and eager calls count alike. Every word has one writer.
#pragma once

#include <cstddef>
#include <cstdint>

namespace asyncdiff {

constexpr int kMaxReceivers = 16;  // SenderDevice is a parameter of every put
// A fused put has as many blocks as the channel has flags, each on a line of its own: a block says
// that its part has arrived without waiting for the others.
constexpr int kMaxFlags = 32;
constexpr int kFlagStride = 128 / sizeof(std::uint64_t);

// Out of turn is either the slot, or the call: a commit without a begin.
enum class FailureKind : std::uint64_t { kNone = 0, kTimeout = 1, kSlotOrder = 2, kCallOrder = 3 };
enum class Operation : std::uint64_t { kBegin = 0, kPush = 1, kCommit = 2, kGet = 3, kRelease = 4 };

// What a kernel leaves for the host when it gives up. In pinned host memory, one for each end of
// a channel; `kind` is written last.
struct alignas(128) FailureRecord {
  std::uint64_t kind;  // FailureKind
  std::uint64_t operation;
  std::uint64_t slot;
  std::uint64_t expected;
  std::uint64_t seen;
  std::int64_t peer;
  std::uint64_t time;  // %globaltimer, ns
};

// What bounds every wait.
struct WaitContext {
  std::uint64_t* abort;  // one word of the fabric in pinned host memory; not zero ends all waits
  FailureRecord* record;
  unsigned* claimed;  // one word of this end, on its device: who sets it first writes the record
  std::uint64_t deadline_ns;
};

// Local to the sender, in its device memory. A bundle has begun once its slot is free: while it is
// not committed, begun is one more than committed, and pushes may write.
struct alignas(128) SenderCounters {
  std::uint64_t begun;
  std::uint64_t committed;
  unsigned finished;   // blocks of the fused put that is running
  unsigned failed;     // of WaitContext
  std::uint64_t left;  // with a simulated link: when the last piece has left, ns
};

// Local to a receiver, in its device memory.
struct alignas(128) ReceiverCounters {
  std::uint64_t got;
  std::uint64_t released;
  unsigned finished;  // blocks of the fused get that is running
  unsigned failed;    // of WaitContext
};

// How a bundle travels. Flagged: as it is, then the channel's flags are set to its epoch. Inline:
// every 8 bytes carry 4 bytes of it and the low half of its epoch, so that no flag is needed; it
// takes twice the memory, and the receiver has to look at every word. 8 bytes, because no more are
// sure to arrive together.
enum class Protocol : int { kFlagged = 0, kInline = 1 };

struct SenderDevice {
  SenderCounters* counters;
  WaitContext context;
  Protocol protocol;
  int slots;
  int flags;  // and blocks of a fused put
  int receivers;
  int targets;
  std::uint64_t slot_nbytes;
  int ranks[kMaxReceivers];
  // Written by receivers, in memory near the sender.
  const std::uint64_t* credits[kMaxReceivers];
  // Written by the sender, in memory near each receiver: the first of `flags`.
  std::uint64_t* arrived[kMaxReceivers];
  // Where the slots lie that are written: mailboxes (or their inline words), and the memory of
  // staged receivers once.
  std::byte* target[kMaxReceivers];
};

struct ReceiverDevice {
  ReceiverCounters* counters;
  WaitContext context;
  Protocol protocol;
  int slots;
  int flags;  // and blocks of a fused get
  int sender_rank;
  std::uint64_t slot_nbytes;
  const std::uint64_t* arrived;
  std::uint64_t* credit;
  const std::byte* source;  // where bundles arrive, with twice the bytes a slot if inline
  std::byte* mailbox;       // where a get that is not fused leaves them
};

}  // namespace asyncdiff
