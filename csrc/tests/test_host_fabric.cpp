// Threads exchange bundles through the host fabric; waits end.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "../src/host_shared.hpp"
#include "asyncdiff/errors.hpp"
#include "asyncdiff/host_fabric.hpp"
#include "asyncdiff/interrupt.hpp"
#include "check.hpp"

using namespace asyncdiff;

namespace {

constexpr int kCount = 5000;
constexpr std::size_t kWords = 1000;

void every_bundle_arrives_once_and_whole(int slots) {
  HostFabric fabric(3, 20.0);
  const Layout layout({TensorSpec("uint32", {kWords}), TensorSpec("uint8", {3})});
  const auto channel = fabric.channel(0, {1, 2}, layout, slots, "numbers");

  std::thread sender([&] {
    std::vector<std::uint32_t> words(kWords);
    for (int n = 0; n < kCount; ++n) {
      for (std::size_t i = 0; i < kWords; ++i) words[i] = static_cast<std::uint32_t>(n) + i;
      const std::uint8_t bytes[3] = {1, 2, static_cast<std::uint8_t>(n)};
      channel->begin(n % slots, 0);
      channel->push(0, words.data(), n % slots, 0);
      channel->push(1, bytes, n % slots, 0);
      channel->commit(n % slots, 0);
    }
  });
  std::vector<std::thread> receivers;
  for (int rank : {1, 2}) {
    receivers.emplace_back([&, rank] {
      for (int n = 0; n < kCount; ++n) {
        channel->get(rank, n % slots, 0);
        const std::byte* slot = channel->slot(rank, n % slots).data;
        std::uint32_t word = 0;
        for (std::size_t i = 0; i < kWords; i += 7) {
          std::memcpy(&word, slot + 4 * i, 4);
          CHECK(word == static_cast<std::uint32_t>(n) + i);
        }
        CHECK(static_cast<std::uint8_t>(slot[layout.offsets[1] + 2]) ==
              static_cast<std::uint8_t>(n));
        channel->release(rank, n % slots, 0);
      }
    });
  }
  sender.join();
  for (std::thread& receiver : receivers) receiver.join();
  fabric.check();
}

void waits_end() {
  HostFabric fabric(2, 0.05);
  const auto channel = fabric.channel(1, {0}, Layout({TensorSpec("uint8", {1})}), 2, "");
  CHECK_THROWS(channel->get(0, 0, 0), ExchangeTimeout);
  CHECK_THROWS(fabric.check(), ExchangeTimeout);
  fabric.reset();
  CHECK_THROWS(channel->get(0, 1, 0), SlotOrderError);
  fabric.reset();
  fabric.abort(1, "enough");
  CHECK_THROWS(channel->get(0, 0, 0), Aborted);
  fabric.reset();
  fabric.check();
  fabric.close();
  CHECK_THROWS(channel->begin(0, 0), Error);
}

// Before anything of it is sent.
void tensors_without_memory_are_refused() {
  HostFabric fabric(2, 0.05);
  const Layout layout({TensorSpec("uint8", {1}), TensorSpec("uint8", {0})});
  const auto one = fabric.channel(0, {1}, layout, 1, "one");
  const auto two = fabric.channel(0, {1}, layout, 1, "two");
  const std::uint8_t byte = 7;
  CHECK_THROWS(one->put({nullptr, &byte}, 0, 0), InvalidArgument);
  CHECK_THROWS(one->put({&byte}, 0, 0), InvalidArgument);
  const std::vector<const void*> whole = {&byte, nullptr};  // the second one has no bytes
  CHECK_THROWS(fabric.put_batch({{one, whole, 0}, {two, {nullptr, nullptr}, 0}}, 0),
               InvalidArgument);
  CHECK_THROWS(fabric.put_batch({{one, whole, 0}, {two, {&byte}, 0}}, 0), InvalidArgument);
  one->begin(0, 0);
  CHECK_THROWS(one->push(0, nullptr, 0, 0), InvalidArgument);
  one->push(0, &byte, 0, 0);
  one->push(1, nullptr, 0, 0);
  one->commit(0, 0);
  fabric.put_batch({{two, whole, 0}}, 0);
  for (const auto& channel : {one, two}) {
    channel->get(1, 0, 0);
    CHECK(*channel->slot(1, 0).data == std::byte{7});
  }
}

void an_abort_wakes_who_waits() {
  HostFabric fabric(2, 60.0);
  const auto channel = fabric.channel(1, {0}, Layout({TensorSpec("uint8", {1})}), 2, "");
  std::thread waiting([&] { CHECK_THROWS(channel->get(0, 0, 0), Aborted); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const auto begun = std::chrono::steady_clock::now();
  fabric.abort(1, "enough");
  waiting.join();
  CHECK(std::chrono::steady_clock::now() - begun < std::chrono::seconds(10));
}

struct Interrupted {};

void an_interrupted_wait_was_none() {
  HostFabric fabric(2, 60.0);
  const auto channel = fabric.channel(0, {1}, Layout({TensorSpec("uint8", {1})}), 1, "");
  const std::uint8_t byte = 7;
  set_interrupt_check([] { throw Interrupted(); });
  CHECK_THROWS(channel->get(1, 0, 0), Interrupted);
  channel->put({&byte}, 0, 0);
  CHECK_THROWS(channel->begin(0, 0), Interrupted);
  CHECK_THROWS(channel->put({&byte}, 0, 0), Interrupted);
  set_interrupt_check(nullptr);
  for (int n = 0; n < 2; ++n) {
    channel->get(1, 0, 0);
    CHECK(*channel->slot(1, 0).data == std::byte{7});
    channel->release(1, 0, 0);
    channel->put({&byte}, 0, 0);
  }
  fabric.check();
}

void a_batch_is_of_one_fabric() {
  HostFabric fabric(2, 1.0);
  HostFabric other(2, 1.0);
  const Layout nothing((std::vector<TensorSpec>()));
  const auto mine = fabric.channel(0, {1}, nothing, 1, "");
  const auto foreign = other.channel(0, {1}, nothing, 1, "");
  CHECK_THROWS(fabric.put_batch({{mine, {}, 0}, {foreign, {}, 0}}, 0), InvalidArgument);
  CHECK_THROWS(fabric.put_batch({{mine, {}, 0}, {nullptr, {}, 0}}, 0), InvalidArgument);
  fabric.put_batch({{mine, {}, 0}}, 0);  // nothing was put before
}

// Its thread may wait for a core before it has written all of it.
void a_report_may_take_long() {
  HostFabric::Shared shared(Processes(2), 60.0);
  HostFailure& failure = shared.control->failure;
  failure.state.store(HostFailure::kBeingWritten);
  std::thread writing([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    failure.kind = HostFailure::kAborted;
    failure.state.store(HostFailure::kThere, std::memory_order_release);
  });
  CHECK_THROWS(shared.check(), Aborted);
  writing.join();
  failure.state.store(HostFailure::kBeingWritten);
  CHECK_THROWS(shared.check(), Error);  // not for ever
}

}  // namespace

int main() {
  for (int slots : {1, 2, 3}) every_bundle_arrives_once_and_whole(slots);
  waits_end();
  tensors_without_memory_are_refused();
  an_abort_wakes_who_waits();
  an_interrupted_wait_was_none();
  a_batch_is_of_one_fabric();
  a_report_may_take_long();
}
