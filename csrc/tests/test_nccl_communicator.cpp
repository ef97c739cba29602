// A communicator over a fake NCCL that takes its time, hangs and fails.
#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "../cuda/nccl_communicator.hpp"
#include "asyncdiff/errors.hpp"
#include "check.hpp"
#include "fake_nccl.hpp"

using namespace asyncdiff;

namespace {

using Clock = std::chrono::steady_clock;

const NcclLibrary& library() {
  static const NcclLibrary loaded(FAKE_NCCL);
  return loaded;
}

FakeNccl& fake() {
  static auto* const found =
      static_cast<FakeNccl*>(dlsym(dlopen(FAKE_NCCL, RTLD_NOW | RTLD_LOCAL), "fake_nccl"));
  return *found;
}

NcclUniqueId id() {
  NcclUniqueId out{};
  library().get_unique_id(&out);
  return out;
}

NcclLimits limits(double seconds) { return {seconds, {}}; }

// How many threads have been told that they call NCCL.
std::atomic<int> entered{0};
void enter() { ++entered; }

bool all_given_back() { return wait_for_nccl_calls(Clock::now() + std::chrono::seconds(5)); }

void start() {
  CHECK(all_given_back());
  fake().state = 0;
  entered = 0;
  fake().made = fake().finalized = fake().destroyed = fake().aborted = 0;
}

void it_is_made_as_asked_for() {
  start();
  NcclCommunicator sender(library(), id(), NcclCommunicator::kSender, enter, limits(5));
  CHECK(fake().made == 1 && fake().ranks == 2 && fake().rank == 0 && entered == 1);
  CHECK(fake().id_byte == 7);
  NcclConfig config;
  std::memcpy(&config, fake().config, sizeof config);
  CHECK(config.size == 48 && config.magic == 0xcafebeefu && config.version == 21800);
  CHECK(config.blocking == 1 && config.fewest_blocks == 1 && config.most_blocks == 32);
  CHECK(config.network == nullptr && config.cluster_size == NcclConfig::kUndefined);
  int data = 0, stream = 0;
  sender.send(&data, 4, &stream);
  CHECK(fake().last.count == 4 && fake().last.type == 1 && fake().last.peer == 1);
  CHECK(fake().last.stream == &stream);
  CHECK(entered == 2);  // the first message connects
  sender.send(&data, 8, &stream);
  CHECK(entered == 2 && fake().last.count == 8);
  sender.check();
  sender.close();
  CHECK(fake().finalized == 1 && fake().destroyed == 1 && fake().aborted == 0);
  CHECK_THROWS(sender.send(&data, 4, &stream), NcclError);
  sender.abort();
  sender.close();
  CHECK(fake().destroyed == 1 && fake().aborted == 0);
}

void making_one_has_a_limit() {
  start();
  fake().making_waits = true;
  const auto begun = Clock::now();
  CHECK_THROWS(NcclCommunicator(library(), id(), NcclCommunicator::kReceiver, enter, limits(0.05)),
               NcclError);
  // Called off.
  const NcclLimits stopped{60, [] { throw std::runtime_error("stop"); }};
  CHECK_THROWS(NcclCommunicator(library(), id(), NcclCommunicator::kReceiver, enter, stopped),
               std::runtime_error);
  CHECK(Clock::now() - begun < std::chrono::seconds(2));
  fake().making_waits = false;
  // Those that were made all the same are not kept.
  CHECK(all_given_back() && fake().made == 2 && fake().aborted == 2);
}

void messages_have_a_limit() {
  start();
  int data = 0;
  fake().messages_wait = true;
  {  // the first one
    NcclCommunicator one(library(), id(), NcclCommunicator::kSender, enter, limits(0.05));
    CHECK_THROWS(one.receive(&data, 4, nullptr), NcclError);
  }
  CHECK(all_given_back() && fake().aborted == 1);
  fake().messages_wait = false;
  fake().send_result = kNcclRemoteError;
  for (const NcclLimits& limit :
       {limits(0.05), NcclLimits{60, [] { throw std::runtime_error("stop"); }}}) {
    start();
    fake().send_result = 0;
    NcclCommunicator one(library(), id(), NcclCommunicator::kSender, enter, limits(5));
    one.send(&data, 4, nullptr);
    one.set_limits(limit);
    fake().messages_wait = true;
    fake().send_result = kNcclRemoteError;
    const auto begun = Clock::now();
    CHECK_THROWS(one.send(&data, 4, nullptr), NcclError);
    CHECK(Clock::now() - begun < std::chrono::seconds(2));
    fake().messages_wait = false;
    CHECK_THROWS(one.send(&data, 4, nullptr), NcclError);  // it is gone
    one.close();
    CHECK(all_given_back() && fake().aborted == 1 && fake().destroyed == 0);
  }
  fake().send_result = 0;
}

void failures_are_told() {
  start();
  fake().make_result = 2;
  CHECK_THROWS(NcclCommunicator(library(), id(), NcclCommunicator::kSender, enter, limits(5)),
               NcclError);
  fake().make_result = 0;
  NcclCommunicator one(library(), id(), NcclCommunicator::kSender, enter, limits(5));
  fake().state = kNcclRemoteError;
  CHECK_THROWS(one.check(), NcclError);
  int data = 0;
  fake().state = 0;
  fake().send_result = 5;
  CHECK_THROWS(one.send(&data, 4, nullptr), NcclError);
  fake().send_result = 0;
  one.send(&data, 4, nullptr);
}

// It gives its memory back when the device has done everything else, which may be never.
void an_abort_waits_for_nothing() {
  start();
  fake().aborts_wait = true;
  const auto begun = Clock::now();
  {
    NcclCommunicator one(library(), id(), NcclCommunicator::kSender, enter, limits(5));
    NcclCommunicator two(library(), id(), NcclCommunicator::kSender, enter, limits(5));
    one.abort();
    two.abort();
  }
  CHECK(Clock::now() - begun < std::chrono::seconds(1));
  CHECK(!wait_for_nccl_calls(Clock::now() + std::chrono::milliseconds(20)));
  fake().aborts_wait = false;
  CHECK(all_given_back() && fake().aborted == 2);
}

void nothing_is_left_behind() {
  start();
  for (int i = 0; i < 200; ++i) {
    NcclCommunicator one(library(), id(), NcclCommunicator::kSender, enter, limits(5));
    if (i % 2 == 0) one.close();
  }
  CHECK(all_given_back());
  CHECK(fake().made == 200 && fake().destroyed == 100 && fake().aborted == 100);
}

}  // namespace

int main() {
  it_is_made_as_asked_for();
  making_one_has_a_limit();
  messages_have_a_limit();
  failures_are_told();
  an_abort_waits_for_nothing();
  nothing_is_left_behind();
}
