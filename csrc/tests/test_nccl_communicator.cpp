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
}

void it_is_made_as_asked_for() {
  start();
  fake().polls = 20;
  NcclCommunicator sender(library(), id(), NcclCommunicator::kSender, limits(5));
  CHECK(fake().made == 1 && fake().polls == 0 && fake().ranks == 2 && fake().rank == 0);
  CHECK(fake().id_byte == 7);
  NcclConfig config;
  std::memcpy(&config, fake().config, sizeof config);
  CHECK(config.size == 48 && config.magic == 0xcafebeefu && config.version == 21800);
  CHECK(config.blocking == 0 && config.fewest_blocks == 1 && config.most_blocks == 32);
  CHECK(config.network == nullptr && config.cluster_size == NcclConfig::kUndefined);
  fake().polls = 3;
  int data = 0, stream = 0;
  sender.send(&data, 4, &stream);
  CHECK(fake().last.count == 4 && fake().last.type == 1 && fake().last.peer == 1);
  CHECK(fake().last.stream == &stream);
  sender.check();
  fake().polls = 3;
  sender.close();
  CHECK(fake().finalized == 1 && fake().destroyed == 1 && fake().aborted == 0);
  CHECK_THROWS(sender.send(&data, 4, &stream), NcclError);
  sender.abort();
  sender.close();
  CHECK(fake().destroyed == 1 && fake().aborted == 0);
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
    NcclCommunicator one(library(), id(), NcclCommunicator::kSender, limits(0.05));
    fake().polls = FakeNccl::kForever;
    int data = 0;
    CHECK_THROWS(one.receive(&data, 4, nullptr), NcclError);
    one.close();  // the other side does not come: it is aborted
    CHECK(all_given_back() && fake().destroyed == 0 && fake().aborted == 1);
  }
  CHECK(all_given_back() && fake().aborted == 1);
}

void failures_are_told() {
  start();
  fake().make_result = 2;
  CHECK_THROWS(NcclCommunicator(library(), id(), NcclCommunicator::kSender, limits(5)), NcclError);
  fake().make_result = 0;
  NcclCommunicator one(library(), id(), NcclCommunicator::kSender, limits(5));
  fake().state = kNcclRemoteError;
  CHECK_THROWS(one.check(), NcclError);
  int data = 0;
  CHECK_THROWS(one.send(&data, 4, nullptr), NcclError);
  fake().state = 0;
  fake().send_result = 5;
  CHECK_THROWS(one.send(&data, 4, nullptr), NcclError);
  fake().send_result = 7;
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
  CHECK(all_given_back() && fake().aborted == 2);
}

void nothing_is_left_behind() {
  start();
  for (int i = 0; i < 200; ++i) {
    NcclCommunicator one(library(), id(), NcclCommunicator::kSender, limits(5));
    if (i % 2 == 0) one.close();
  }
  CHECK(all_given_back());
  CHECK(fake().made == 200 && fake().destroyed == 100 && fake().aborted == 100);
}

}  // namespace

int main() {
  it_is_made_as_asked_for();
  waits_have_limits();
  failures_are_told();
  an_abort_waits_for_nothing();
  nothing_is_left_behind();
}
