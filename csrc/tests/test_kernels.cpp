// The kernels of a channel on the CPU: bundles arrive whole by any protocol, and a begin that
// failed grants no slot: what comes behind it stores nothing.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "check.hpp"
#include "device_on_cpu.hpp"
// After it.
#include "../cuda/get.cuh"
#include "../cuda/nccl_signals.cuh"
#include "../cuda/put.cuh"
#include "../cuda/signals.cuh"

using namespace asyncdiff;

namespace {

constexpr int kReceivers = 2;
constexpr int kSlots = 2;
constexpr std::uint64_t kDeadline = 10'000'000;  // ns

// One sender and two receivers, and all that they share.
struct World {
  explicit World(Protocol how, std::vector<std::uint64_t> sizes) : protocol(how) {
    std::mt19937 random(3);
    for (const std::uint64_t nbytes : sizes) {
      // Not all sources are aligned.
      memory.emplace_back(nbytes + 32);
      for (std::byte& b : memory.back()) b = static_cast<std::byte>(random());
      pieces.push_back({memory.back().data() + pieces.size(), slot_nbytes, nbytes});
      slot_nbytes += (nbytes + 255) / 256 * 256;
    }
    const bool inlined = how == Protocol::kInline;
    sender.counters = &sent;
    sender.context = {&abort, &sent_record, &sent.failed, kDeadline};
    sender.protocol = how;
    sender.slots = kSlots;
    sender.flags = inlined ? 4 : 7;
    sender.receivers = sender.targets = kReceivers;
    sender.slot_nbytes = slot_nbytes;
    for (int r = 0; r < kReceivers; ++r) {
      landing[r].resize((inlined ? 2 : 1) * kSlots * slot_nbytes + 16);
      mailbox[r].resize(kSlots * slot_nbytes + 16);
      arrived[r].resize(static_cast<std::size_t>(sender.flags * kFlagStride));
      sender.ranks[r] = r + 1;
      sender.credits[r] = &credit[r];
      sender.arrived[r] = arrived[r].data();
      sender.target[r] = aligned(landing[r]);
      receiver[r] = {&got[r],
                     {&abort, &got_record[r], &got[r].failed, kDeadline},
                     how,
                     kSlots,
                     sender.flags,
                     0,
                     slot_nbytes,
                     arrived[r].data(),
                     &credit[r],
                     aligned(landing[r]),
                     inlined ? aligned(mailbox[r]) : aligned(landing[r])};
    }
  }

  static std::byte* aligned(std::vector<std::byte>& memory) {
    const auto at = reinterpret_cast<std::uintptr_t>(memory.data());
    return memory.data() + (16 - at % 16) % 16;
  }
  void begin(int slot) {
    on_cpu::machine.run(1, kWarp, [&] { begin_kernel(sender, slot); });
  }
  void push(std::size_t i, int slot) {
    const auto blocks = static_cast<unsigned>(flags_for(pieces[i].nbytes, sender.flags));
    on_cpu::machine.run(blocks, kThreads, [&] { push_kernel(sender, pieces[i], slot); });
  }
  void push_all(int slot) {
    for (std::size_t i = 0; i < pieces.size(); ++i) push(i, slot);
  }
  void commit(int slot) {
    on_cpu::machine.run(1, kWarp, [&] { commit_kernel(sender, slot); });
  }
  void put(int slot) {
    SmallPut all;
    all.count = 1;
    all.sender[0] = sender;
    all.slot[0] = slot;
    all.first_piece[1] = static_cast<int>(pieces.size());
    all.first_block[1] = sender.flags;
    for (std::size_t i = 0; i < pieces.size(); ++i) all.pieces[i] = pieces[i];
    on_cpu::machine.run(static_cast<unsigned>(sender.flags), kThreads, [&] { put_kernel(all); });
  }
  void get(int r, int slot) {
    if (protocol == Protocol::kInline) {
      on_cpu::machine.run(static_cast<unsigned>(sender.flags), kThreads,
                          [&] { get_inline_kernel(receiver[r], slot); });
    } else {
      on_cpu::machine.run(1, kWarp, [&] { get_kernel(receiver[r], slot); });
    }
  }
  void release(int r, int slot) {
    on_cpu::machine.run(1, kWarp, [&] { release_kernel(receiver[r], slot); });
  }
  void receive(int slot) {
    for (int r = 0; r < kReceivers; ++r) {
      get(r, slot);
      release(r, slot);
    }
  }
  bool is_there(int slot) const {
    bool whole = true;
    for (int r = 0; r < kReceivers; ++r) {
      const std::byte* begin = receiver[r].mailbox + slot * slot_nbytes;
      for (const Piece& piece : pieces) {
        whole = whole && std::memcmp(begin + piece.offset, piece.memory, piece.nbytes) == 0;
      }
    }
    return whole;
  }
  void change() {
    for (auto& tensor : memory) {
      for (std::byte& b : tensor) b ^= std::byte{0x5a};
    }
  }

  Protocol protocol;
  std::vector<std::vector<std::byte>> memory;
  std::vector<Piece> pieces;
  std::uint64_t slot_nbytes = 0;
  std::uint64_t abort = 0;
  SenderCounters sent{};
  ReceiverCounters got[kReceivers]{};
  FailureRecord sent_record{};
  FailureRecord got_record[kReceivers]{};
  std::uint64_t credit[kReceivers]{};
  std::vector<std::uint64_t> arrived[kReceivers];
  std::vector<std::byte> landing[kReceivers];
  std::vector<std::byte> mailbox[kReceivers];
  SenderDevice sender{};
  ReceiverDevice receiver[kReceivers]{};
};

bool is(const FailureRecord& record, FailureKind kind, Operation operation) {
  return record.kind == static_cast<std::uint64_t>(kind) &&
         record.operation == static_cast<std::uint64_t>(operation);
}

const std::vector<std::uint64_t> kSizes = {1, 5000, 257, 40'000};

void bundles_arrive_whole(Protocol protocol) {
  World world(protocol, kSizes);
  for (int n = 0; n < 6; ++n) {
    const int slot = n % kSlots;
    world.change();
    if (n % 2 == 0 && n < 4) {
      world.put(slot);
    } else {
      world.begin(slot);
      world.push_all(slot);
      world.commit(slot);
    }
    world.receive(slot);
    CHECK(world.is_there(slot));
    CHECK(world.abort == 0);
  }
  CHECK(world.sent.committed == 6 && world.credit[1] == 6);
}

// What was there stays, and nobody is told of a new bundle.
template <class Work>
void nothing_is_stored(World& world, Work work) {
  world.change();
  const auto before = std::vector<std::vector<std::byte>>{world.landing[0], world.landing[1]};
  const auto flags = world.arrived[0];
  const std::uint64_t committed = world.sent.committed;
  work();
  CHECK(world.landing[0] == before[0] && world.landing[1] == before[1]);
  CHECK(world.arrived[0] == flags && world.sent.committed == committed);
  CHECK(world.abort == 1);
}

void a_begin_that_failed_grants_no_slot(Protocol protocol) {
  {
    World world(protocol, kSizes);
    world.put(0);
    world.get(0, 0);  // and reads it
    nothing_is_stored(world, [&] {
      world.begin(0);  // slot 1 is next
      world.push_all(0);
      world.commit(0);
    });
    CHECK(is(world.sent_record, FailureKind::kSlotOrder, Operation::kBegin));
    CHECK(world.sent_record.expected == 1 && world.sent_record.seen == 1);
  }
  {
    World world(protocol, kSizes);
    for (int slot = 0; slot < kSlots; ++slot) world.put(slot);
    world.get(0, 0);
    nothing_is_stored(world, [&] {
      world.begin(0);  // nobody has released it
      world.push_all(0);
      world.commit(0);
    });
    CHECK(is(world.sent_record, FailureKind::kTimeout, Operation::kBegin));
    // Nor do pushes once it is released, before a reset.
    world.release(0, 0);
    nothing_is_stored(world, [&] { world.push_all(0); });
  }
  {
    World world(protocol, kSizes);
    world.abort = 1;  // somebody else has failed, and a slot is still read
    world.sent = {2, 2, 0, 0};
    nothing_is_stored(world, [&] {
      world.begin(0);
      world.push_all(0);
      world.commit(0);
      world.put(0);
    });
    CHECK(world.sent_record.kind == 0);
  }
}

void a_begin_that_was_granted_stays_granted(Protocol protocol) {
  World world(protocol, kSizes);
  world.begin(0);
  world.push_all(0);
  world.begin(1);  // before a commit
  CHECK(is(world.sent_record, FailureKind::kCallOrder, Operation::kBegin));
  nothing_is_stored(world, [&] {
    world.push_all(1);
    world.put(1);
  });
}

void calls_out_of_order_are_told_from_slots(Protocol protocol) {
  {
    World world(protocol, kSizes);
    nothing_is_stored(world, [&] { world.push(1, 0); });
    CHECK(is(world.sent_record, FailureKind::kCallOrder, Operation::kPush));
  }
  {
    World world(protocol, kSizes);
    world.begin(0);
    nothing_is_stored(world, [&] { world.push(1, 1); });
    CHECK(is(world.sent_record, FailureKind::kSlotOrder, Operation::kPush));
  }
  {
    World world(protocol, kSizes);
    nothing_is_stored(world, [&] { world.commit(0); });
    CHECK(is(world.sent_record, FailureKind::kCallOrder, Operation::kCommit));
  }
  {
    World world(protocol, kSizes);
    world.put(0);
    world.release(0, 0);
    CHECK(is(world.got_record[0], FailureKind::kCallOrder, Operation::kRelease));
    CHECK(world.credit[0] == 0);
  }
  {
    World world(protocol, kSizes);
    world.put(0);
    world.get(0, 1);
    CHECK(is(world.got_record[0], FailureKind::kSlotOrder, Operation::kGet));
  }
}

void a_get_that_failed_gives_nothing_back(Protocol protocol) {
  World world(protocol, kSizes);
  world.get(0, 0);
  CHECK(is(world.got_record[0], FailureKind::kTimeout, Operation::kGet));
  CHECK(world.got_record[0].expected == 1 && world.got_record[0].seen == 0);
  CHECK(world.got_record[0].peer == 0 && world.abort == 1);
  world.release(0, 0);
  CHECK(world.got[0].got == 0 && world.got[0].released == 0 && world.credit[0] == 0);
}

// Both receivers are late, so both lanes that wait for them fail, at once.
void one_failure_is_recorded_whole() {
  World world(Protocol::kFlagged, kSizes);
  world.sent = {10, 10, 0, 0};
  world.credit[0] = 7;
  world.credit[1] = 5;
  const FailureRecord& record = world.sent_record;
  on_cpu::machine.watch(&record.kind);
  on_cpu::machine.run(1, 2 * kWarp, [&] {
    if (threadIdx.x < kWarp) {
      begin_kernel(world.sender, 0);
      return;
    }
    if (threadIdx.x != kWarp) return;
    // As the host sees it.
    while (world.abort == 0) on_cpu::machine.yield();
    CHECK(record.kind != 0);
  });
  CHECK(on_cpu::machine.stores() == 1);
  CHECK(record.peer == 1 ? record.seen == 7 : record.peer == 2 && record.seen == 5);
  CHECK(record.expected == 9);
}

// Only of a bundle that has begun, and in its slot.
void pushes_between_hosts_are_told() {
  World world(Protocol::kFlagged, kSizes);
  std::uint64_t word = 0;
  const auto pushed = [&](int slot) {
    on_cpu::machine.run(1, 1, [&] { pushed_kernel(world.sender, slot, &word); });
    return word;
  };
  CHECK(pushed(0) == 0);
  world.begin(0);
  world.push(0, 0);
  CHECK(pushed(1) == 0 && pushed(0) == 1);
  world.commit(0);
  world.begin(1);
  CHECK(pushed(0) == 1 && pushed(1) == 2);
  world.commit(1);
  CHECK(pushed(0) == 2 && pushed(1) == 2);

  std::uint64_t device = 0, host = 0;
  on_cpu::machine.run(1, 1, [&] { publish_kernel({&device, 7, &host, 9}); });
  CHECK(device == 7 && host == 9);
  on_cpu::machine.run(1, 1, [&] { publish_kernel({nullptr, 8, &host, 10}); });
  CHECK(device == 7 && host == 10);
}

}  // namespace

int main() {
  for (const Protocol protocol : {Protocol::kFlagged, Protocol::kInline}) {
    bundles_arrive_whole(protocol);
    a_begin_that_failed_grants_no_slot(protocol);
    a_begin_that_was_granted_stays_granted(protocol);
    calls_out_of_order_are_told_from_slots(protocol);
    a_get_that_failed_gives_nothing_back(protocol);
  }
  one_failure_is_recorded_whole();
  pushes_between_hosts_are_told();
}
