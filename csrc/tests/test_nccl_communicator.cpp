// A communicator over a fake NCCL that takes its time, hangs and fails.
#include <dlfcn.h>

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

NcclCommunicator::Limits limits(double seconds) { return {seconds, {}}; }

bool all_given_back() {
  return NcclCommunicator::wait_for_all(Clock::now() + std::chrono::seconds(5));
}

void start() {
  CHECK(all_given_back());
  fake().polls = 0;
  fake().state = 0;
  fake().made = fake().finalized = fake().destroyed = fake().aborted = 0;
  fake().enrolled = fake().withdrawn = 0;
}

void it_is_made_as_asked_for() {
  start();
  fake().polls = 20;
  NcclCommunicator sender(library(), id(), NcclCommunicator::kSender, limits(5));
  CHECK(fake().made == 2 && fake().polls == 0 && fake().ranks == 2 && fake().rank == 0);
  CHECK(fake().id_byte == 7);
  NcclConfig config;
  std::memcpy(&config, fake().config, sizeof config);
  CHECK(config.size == 48 && config.magic == 0xcafebeefu && config.version == 21800);
  CHECK(config.blocking == 0 && config.fewest_blocks == 1 && config.most_blocks == 32);
  CHECK(config.network == nullptr && config.cluster_size == NcclConfig::kUndefined);
  // The one that is used enqueues in the thread that calls.
  std::memcpy(&config, fake().split_config, sizeof config);
  CHECK(config.blocking == 1 && config.fewest_blocks == 1 && config.most_blocks == 32);
  int data = 0, stream = 0;
  sender.exchange_first(&data, 8, &stream, [] {});
  CHECK(fake().last.count == 8 && fake().last.peer == 1 && fake().last.stream == &stream);
  sender.send(&data, 4, &stream);
  CHECK(fake().last.count == 4 && fake().last.type == 1 && fake().last.peer == 1);
  CHECK(fake().last.stream == &stream);
  sender.check();
  sender.close();
  CHECK(fake().finalized == 1 && fake().destroyed == 2 && fake().aborted == 0);
  CHECK_THROWS(sender.send(&data, 4, &stream), NcclError);
  sender.abort();
  sender.close();
  CHECK(fake().destroyed == 2 && fake().aborted == 0);
}

// Of memory that NCCL knows. The other side's part in it may wait.
void memory_is_enrolled_and_withdrawn() {
  start();
  bool freed = false;
  {
    NcclCommunicator one(library(), id(), NcclCommunicator::kSender, limits(0.05));
    int data = 0;
    void* const known = one.enroll(&data, 4);
    CHECK(known == &data && fake().enrolled == 1);
    one.withdraw(known, [&] { freed = true; });
    CHECK(all_given_back() && freed && fake().withdrawn == 1);
    fake().enroll_result = 5;
    CHECK(one.enroll(&data, 4) == nullptr);
    fake().enroll_result = 0;
    freed = false;
    one.withdraw(nullptr, [&] { freed = true; });
    CHECK(all_given_back() && freed && fake().withdrawn == 1);
    // It waits for nobody, and what waits is ended.
    freed = false;
    fake().calls_wait = true;
    one.withdraw(known, [&] { freed = true; });
    CHECK(!NcclCommunicator::wait_for_all(Clock::now() + std::chrono::milliseconds(20)));
    one.close();  // the other side is stuck: it is aborted
    CHECK(all_given_back() && freed && fake().aborted == 2);
    fake().calls_wait = false;
    one.withdraw(known, [&] { freed = true; });
    CHECK(all_given_back() && fake().withdrawn == 2);
  }
}

void waits_have_limits() {
  start();
  fake().polls = FakeNccl::kForever;
  const auto begun = Clock::now();
  CHECK_THROWS(NcclCommunicator(library(), id(), NcclCommunicator::kReceiver, limits(0.05)),
               NcclError);
  CHECK(Clock::now() - begun < std::chrono::seconds(2));
  CHECK(all_given_back() && fake().aborted == 1);
  // Called off.
  start();
  fake().polls = FakeNccl::kForever;
  const NcclCommunicator::Limits stopped{60, [] { throw std::runtime_error("stop"); }};
  CHECK_THROWS(NcclCommunicator(library(), id(), NcclCommunicator::kReceiver, stopped),
               std::runtime_error);
  CHECK(all_given_back() && fake().aborted == 1);
  start();
  {
    NcclCommunicator one(library(), id(), NcclCommunicator::kReceiver, limits(0.05));
    fake().calls_wait = true;
    int data = 0;
    CHECK_THROWS(one.exchange_first(&data, 8, nullptr, [] {}), NcclError);
    CHECK(all_given_back() && fake().aborted == 2);
    CHECK_THROWS(one.receive(&data, 4, nullptr), NcclError);
    fake().calls_wait = false;
  }
  CHECK(all_given_back() && fake().aborted == 2);
  // A message that waits is ended by an abort, which may come from any thread.
  start();
  {
    NcclCommunicator one(library(), id(), NcclCommunicator::kReceiver, limits(5));
    fake().calls_wait = true;
    std::thread aborting([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      one.abort();
    });
    int data = 0;
    CHECK_THROWS(one.receive(&data, 4, nullptr), NcclError);
    aborting.join();
    fake().calls_wait = false;
  }
}

void failures_are_told() {
  start();
  fake().make_result = 2;
  CHECK_THROWS(NcclCommunicator(library(), id(), NcclCommunicator::kSender, limits(5)), NcclError);
  fake().make_result = 0;
  fake().split_result = 2;
  CHECK_THROWS(NcclCommunicator(library(), id(), NcclCommunicator::kSender, limits(5)), NcclError);
  fake().split_result = 7;
  NcclCommunicator one(library(), id(), NcclCommunicator::kSender, limits(5));
  fake().state = kNcclRemoteError;
  CHECK_THROWS(one.check(), NcclError);
  int data = 0;
  fake().state = 0;
  fake().send_result = 5;
  CHECK_THROWS(one.send(&data, 4, nullptr), NcclError);
  fake().send_result = 0;
}

// It gives its memory back when the device has done everything else, which may be never.
void an_abort_waits_for_nothing() {
  start();
  fake().aborts_wait = true;
  const auto begun = Clock::now();
  {
    NcclCommunicator one(library(), id(), NcclCommunicator::kSender, limits(5));
    NcclCommunicator two(library(), id(), NcclCommunicator::kSender, limits(5));
    one.abort();
    two.abort();
  }
  CHECK(Clock::now() - begun < std::chrono::seconds(1));
  CHECK(!NcclCommunicator::wait_for_all(Clock::now() + std::chrono::milliseconds(20)));
  fake().aborts_wait = false;
  CHECK(all_given_back() && fake().aborted == 4);
}

void nothing_is_left_behind() {
  start();
  for (int i = 0; i < 200; ++i) {
    NcclCommunicator one(library(), id(), NcclCommunicator::kSender, limits(5));
    if (i % 2 == 0) one.close();
  }
  CHECK(all_given_back());
  CHECK(fake().made == 400 && fake().destroyed == 200 && fake().aborted == 200);
}

}  // namespace

int main() {
  it_is_made_as_asked_for();
  memory_is_enrolled_and_withdrawn();
  waits_have_limits();
  failures_are_told();
  an_abort_waits_for_nothing();
  nothing_is_left_behind();
}
