// Couriers of two processes: what they carry, and how they fail.
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "check.hpp"
#include "two_couriers.hpp"

using namespace asyncdiff;

namespace {

void bundles_arrive_in_their_slots() {
  Two two;
  TestChannel channel(two, 0, 5, 2, 1000, std::make_shared<Queue>());
  channel.run(0, 300);
  CHECK(channel.wait_until_all_arrived() == 300);
  CHECK(two.sides[0]->courier.error() == nullptr && two.sides[1]->courier.error() == nullptr);
}

void channels_share_a_link_in_both_directions() {
  Two two;
  const auto up = std::make_shared<Queue>(), down = std::make_shared<Queue>();
  TestChannel a(two, 0, 0, 2, 100, up), b(two, 0, 1, 3, 5000, up), c(two, 1, 0, 1, 1, down),
      d(two, 1, 1, 2, 0, down);
  std::vector<std::thread> all;
  for (TestChannel* one : {&a, &b, &c, &d}) all.emplace_back([one] { one->run(0, 100); });
  for (std::thread& one : all) one.join();
  for (const auto& side : two.sides) CHECK(!side->failures.failed());
}

// A bundle is in its mailbox whether it is asked for or not, and no further one is sent.
void a_bundle_needs_no_receiver() {
  Two two;
  TestChannel channel(two, 0, 0, 2, 64, std::make_shared<Queue>());
  channel.commit(1, 1);
  channel.commit(2, 2);
  CHECK(channel.wait_until_all_arrived() == 2);
  CHECK(channel.holds(1, 1) && channel.holds(2, 2) && channel.queue->waiting() == 0);
  CHECK(load_word(&channel.credit) == 0);
  store_word(&channel.released, 1);
  CHECK(soon([&] { return load_word(&channel.credit) == 1; }));
}

void a_reset_begins_anew() {
  Two two;
  TestChannel channel(two, 0, 0, 4, 64, std::make_shared<Queue>());
  channel.run(0, 10);
  for (std::uint64_t first : {std::uint64_t{0}, std::uint64_t{7}, ~std::uint64_t{0} - 5}) {
    channel.commit(load_word(channel.words) + 1, 9);  // nobody reads it
    channel.wait_until_all_arrived();
    for (const auto& side : two.sides) side->courier.reset(first);
    store_word(&channel.arrived, first);  // in device memory
    CHECK(load_word(&channel.credit) == first && load_word(&channel.released) == first);
    std::this_thread::sleep_for(std::chrono::milliseconds(first == 7 ? 20 : 0));
    CHECK(load_word(&channel.sent) == 0 && load_word(&channel.arrived) == first);
    channel.run(first, 20);
    channel.wait_until_all_arrived();
  }
}

// Of a large bundle, what is packed goes while the rest is not.
void a_large_bundle_goes_in_parts() {
  Two two;
  const std::vector<std::size_t> ends = {kPieceBytes + 256, kPieceBytes + 256, kPieceBytes + 512,
                                         2 * kPieceBytes + 1024, 2 * kPieceBytes + 1280};
  TestChannel channel(two, 0, 0, 2, ends.back(), std::make_shared<Queue>(), ends);
  const auto push = [&](std::size_t i, std::uint64_t n, int value) {
    const std::size_t from = i == 0 ? 0 : ends[i - 1];
    std::memset(channel.staging.data() + channel.out->place(n) + from, value, ends[i] - from);
    store_word(channel.pushed + i, n);
  };
  const auto landed = [&](std::size_t last, std::uint64_t n, int value) {
    const std::size_t at = channel.in->place(n) + last - 1;
    return channel.mailbox[at] == static_cast<std::byte>(value);
  };
  std::uint64_t messages = 0;
  for (std::uint64_t first : {std::uint64_t{0}, std::uint64_t{5}}) {
    for (std::uint64_t n = first + 1; n <= first + 4; ++n) {
      const int value = static_cast<int>(n);
      CHECK(soon([&] { return reached(load_word(&channel.credit), n - 2); }));
      push(3, n, value);  // out of order: it waits for those before it
      push(2, n, value);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      CHECK(load_word(&channel.arrived_on_host) == messages);
      push(0, n, value);
      messages += 1;
      CHECK(soon([&] { return load_word(&channel.arrived_on_host) == messages; }));
      // Nothing has to be pushed of a tensor without bytes, and so all but the last one is there.
      CHECK(landed(ends[3], n, value) && load_word(&channel.arrived) == n - 1);
      push(4, n, value);
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      CHECK(load_word(&channel.arrived_on_host) == messages);  // too small to go by itself
      for (int i = 0; i < TestChannel::kFlags; ++i) {
        store_word(channel.words + i * kFlagStride, n);
      }
      messages += 1;
      CHECK(soon([&] { return load_word(&channel.arrived) == n; }));
      CHECK(channel.holds(n, value));
      store_word(&channel.released, n);
    }
    // One that has begun is dropped by a reset, also what has arrived of it.
    push(0, first + 5, 99);
    CHECK(channel.wait_until_all_arrived() == messages + 1);
    for (const auto& side : two.sides) side->courier.reset(5);
    store_word(&channel.arrived, 5);
    messages = 0;
  }
  for (const auto& side : two.sides) CHECK(!side->failures.failed());
}

void channels_come_and_go() {
  Two two;
  const auto queue = std::make_shared<Queue>();
  for (std::uint32_t number = 0; number < 50; ++number) {
    TestChannel channel(two, 0, number, 2, 64, queue);
    channel.run(0, 3);
    channel.wait_until_all_arrived();
    two.sides[0]->courier.remove(*channel.out);
    two.sides[1]->courier.remove(*channel.in);
    CHECK(channel.out.use_count() == 1 && channel.in.use_count() == 1);
  }
  for (const auto& side : two.sides) CHECK(!side->failures.failed());
}

void one_that_leaves_is_no_failure() {
  Two two;
  TestChannel channel(two, 0, 0, 2, 64, std::make_shared<Queue>());
  channel.run(0, 3);
  channel.wait_until_all_arrived();
  two.sides[1]->courier.stop();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(!two.sides[0]->failures.failed());
  channel.commit(4, 4);  // nobody is there: it is not sent
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(!two.sides[0]->failures.failed() && channel.queue->waiting() == 0);
}

template <class Kind>
bool is(const std::exception_ptr& error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const Kind&) {
    return true;
  } catch (...) {
  }
  return false;
}

void one_that_dies_is_named_at_once() {
  Two two;
  TestChannel channel(two, 0, 0, 2, 64, std::make_shared<Queue>());
  shutdown(two.descriptor, SHUT_RDWR);
  CHECK(soon([&] { return two.sides[0]->failed == 1; }));
  CHECK(is<ProcessLost>(two.sides[0]->courier.error()) && two.sides[0]->failures.failed());
}

// Where its link fails first, too.
void a_death_is_the_cause_of_what_nccl_says() {
  Two two;
  TestChannel channel(two, 0, 0, 2, 64, std::make_shared<Queue>());
  channel.queue->stuck = true;
  channel.commit(1, 1);
  CHECK(soon([&] { return channel.queue->waiting() == 2; }));
  two.sides[0]->over = true;
  channel.queue->broken = true;
  CHECK(soon([&] { return two.sides[0]->failed == 1; }));
  CHECK(two.sides[0]->courier.error() == nullptr);  // told elsewhere
  // The other one knows of nobody who has gone.
  CHECK(soon([&] { return two.sides[1]->failed == 1; }));
  CHECK(is<NcclError>(two.sides[1]->courier.error()));
}

void a_link_that_carries_nothing_passes_the_deadline() {
  Two two(0.2);
  TestChannel channel(two, 0, 0, 2, 64, std::make_shared<Queue>());
  std::this_thread::sleep_for(std::chrono::milliseconds(400));
  CHECK(!two.sides[0]->failures.failed());  // nothing is under way
  channel.run(0, 4);
  channel.queue->stuck = true;
  channel.commit(5, 5);
  CHECK(soon([&] { return two.sides[0]->failed == 1 && two.sides[1]->failed == 1; }));
  try {
    std::rethrow_exception(two.sides[0]->courier.error());
  } catch (const ExchangeTimeout& error) {
    const Incident& what = error.incident;
    CHECK(what.rank == 0 && what.peer == 1 && what.channel == "up" && what.slot == 0);
    CHECK(what.expected == 5 && what.seen == 4 && what.operation == "commit");
  }
  CHECK(is<ExchangeTimeout>(two.sides[1]->courier.error()));
  CHECK_THROWS(two.sides[0]->courier.wait_until_sent(*channel.out), ExchangeTimeout);
}

void the_host_waits_for_bundles() {
  Two two;
  TestChannel channel(two, 0, 0, 2, 64, std::make_shared<Queue>());
  NcclCourier& courier = two.sides[1]->courier;
  courier.wait_for(*channel.in, 0);
  channel.queue->stuck = true;
  channel.commit(1, 1);
  CHECK(soon([&] { return channel.queue->waiting() == 2; }));
  std::atomic<bool> there{false};
  std::thread waiting([&] {
    courier.wait_for(*channel.in, 1);
    there = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!there);
  channel.queue->stuck = false;
  channel.commit(2, 2);  // whatever is enqueued next carries what was stuck
  waiting.join();
  CHECK(channel.holds(1, 1));
  courier.wait_for(*channel.in, 2);
  CHECK(channel.holds(2, 2));
  courier.wait_for(*channel.in, 1);  // long there
  NcclCourier& sending = two.sides[0]->courier;
  sending.wait_free(*channel.out, 2);  // slots that were never used
  there = false;
  std::thread freeing([&] {
    sending.wait_free(*channel.out, 4);
    there = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!there);
  store_word(&channel.released, 2);
  freeing.join();
  sending.wait_free(*channel.out, 3);
  for (std::uint64_t first : {std::uint64_t{7}, ~std::uint64_t{0} - 1}) {
    channel.wait_until_all_arrived();
    for (const auto& side : two.sides) side->courier.reset(first);
    courier.wait_for(*channel.in, 0);
    for (std::uint64_t n = 1; n <= 5; ++n) {
      sending.wait_free(*channel.out, n);
      CHECK(reached(load_word(&channel.credit), first + n - 2));
      channel.commit(first + n, static_cast<int>(n));
      courier.wait_for(*channel.in, n);
      CHECK(channel.holds(first + n, static_cast<int>(n)));
      store_word(&channel.released, first + n);
    }
  }
}

// Of a bundle in parts, all of them.
void the_host_waits_for_all_parts() {
  Two two;
  const std::vector<std::size_t> ends = {kPieceBytes, 2 * kPieceBytes};
  TestChannel channel(two, 0, 0, 2, ends.back(), std::make_shared<Queue>(), ends);
  std::atomic<bool> there{false};
  std::thread waiting([&] {
    two.sides[1]->courier.wait_for(*channel.in, 1);
    there = true;
  });
  store_word(channel.pushed, 1);
  CHECK(soon([&] { return load_word(&channel.arrived_on_host) == 1; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!there);
  channel.commit(1, 3);
  waiting.join();
  CHECK(load_word(&channel.arrived_on_host) == 2);
}

void a_bundle_that_does_not_come_passes_the_deadline() {
  Two two(0.3);
  TestChannel channel(two, 0, 0, 2, 64, std::make_shared<Queue>());
  channel.commit(1, 1);
  NcclCourier& courier = two.sides[1]->courier;
  courier.wait_for(*channel.in, 1);
  try {
    courier.wait_for(*channel.in, 2);
    CHECK(false);
  } catch (const ExchangeTimeout& late) {
    CHECK(late.incident.rank == 1 && late.incident.peer == 0 && late.incident.slot == 1);
    CHECK(late.incident.expected == 2 && late.incident.seen == 1);
    CHECK(late.incident.operation == "get" && late.incident.channel == "up");
  }
  CHECK(soon([&] { return two.sides[1]->failed == 1; }));
  CHECK(is<ExchangeTimeout>(courier.error()));
  CHECK_THROWS(courier.wait_for(*channel.in, 2), ExchangeTimeout);
}

void a_slot_that_is_not_released_passes_the_deadline() {
  Two two(0.3);
  TestChannel channel(two, 0, 0, 2, 64, std::make_shared<Queue>());
  channel.commit(1, 1);
  channel.commit(2, 2);
  try {
    two.sides[0]->courier.wait_free(*channel.out, 3);
    CHECK(false);
  } catch (const ExchangeTimeout& late) {
    CHECK(late.incident.rank == 0 && late.incident.peer == 1 && late.incident.slot == 0);
    CHECK(late.incident.expected == 1 && late.incident.seen == 0);
    CHECK(late.incident.operation == "begin");
  }
  CHECK(soon([&] { return two.sides[0]->failed == 1; }));
}

void an_abort_ends_waits() {
  Two two;
  TestChannel channel(two, 0, 0, 2, 64, std::make_shared<Queue>());
  channel.queue->stuck = true;
  channel.commit(1, 1);
  CHECK(soon([&] { return channel.queue->waiting() == 2; }));
  two.sides[0]->failures.abort(0, "enough");
  two.sides[0]->courier.wake();
  CHECK(soon([&] { return two.sides[0]->failed == 1; }));
  CHECK(two.sides[0]->courier.error() == nullptr);
  CHECK(!two.sides[1]->failures.failed());  // the fabric tells it
  CHECK_THROWS(two.sides[0]->courier.wait_until_sent(*channel.out), Error);
  two.sides[1]->failures.abort(0, "enough");
  CHECK_THROWS(two.sides[1]->courier.wait_for(*channel.in, 1), Error);
}

void nonsense_is_refused() {
  Two two;
  TestChannel channel(two, 0, 0, 2, 64, std::make_shared<Queue>());
  channel.commit(1000, 1);  // not in turn
  CHECK(soon([&] { return two.sides[1]->failed == 1; }));
  CHECK(is<NcclError>(two.sides[1]->courier.error()));
}

}  // namespace

int main() {
  bundles_arrive_in_their_slots();
  channels_share_a_link_in_both_directions();
  a_bundle_needs_no_receiver();
  a_reset_begins_anew();
  a_large_bundle_goes_in_parts();
  channels_come_and_go();
  one_that_leaves_is_no_failure();
  one_that_dies_is_named_at_once();
  a_death_is_the_cause_of_what_nccl_says();
  a_link_that_carries_nothing_passes_the_deadline();
  the_host_waits_for_bundles();
  the_host_waits_for_all_parts();
  a_bundle_that_does_not_come_passes_the_deadline();
  a_slot_that_is_not_released_passes_the_deadline();
  an_abort_ends_waits();
  nonsense_is_refused();
}
