// The failure log of a fabric of GPUs, in host memory that a thread writes as a kernel would.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <string>
#include <thread>
#include <vector>

#include "../cuda/failure_log.hpp"
#include "asyncdiff/errors.hpp"
#include "asyncdiff/memory.hpp"
#include "check.hpp"

using namespace asyncdiff;

namespace {

constexpr std::size_t kLine = 128;
constexpr std::size_t kNote = kLine;
constexpr std::size_t kRecords = 8 * kLine;

std::string message_of(const FailureLog& log) {
  try {
    log.check();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void the_first_failure_is_thrown() {
  const Buffer memory = allocate_host(4096);
  FailureLog log(memory, 0, kNote, 1.5);
  unsigned claimed = 0;
  const WaitContext sender = log.add_end(0, "up", kRecords, &claimed);
  const WaitContext receiver = log.add_end(1, "up", kRecords + kLine, nullptr);
  CHECK(sender.claimed == &claimed && receiver.claimed == nullptr);
  CHECK(sender.deadline_ns == 1'500'000'000 && sender.abort == receiver.abort);
  log.check();
  CHECK(!log.failed());
  const auto write = [](const WaitContext& end, FailureKind kind, Operation operation,
                        std::uint64_t time) {
    *end.record = {
        static_cast<std::uint64_t>(kind), static_cast<std::uint64_t>(operation), 1, 0, 4, 1, time};
    *end.abort = 1;
  };
  write(sender, FailureKind::kTimeout, Operation::kBegin, 200);
  CHECK(log.failed());
  CHECK_THROWS(log.check(), ExchangeTimeout);
  CHECK(has(message_of(log), "rank 0, channel 'up', begin of slot 1: waited 1.5 s for rank 1"));
  write(receiver, FailureKind::kSlotOrder, Operation::kGet, 100);  // before it
  CHECK_THROWS(log.check(), SlotOrderError);
  CHECK(has(message_of(log), "get of slot 1: slot 0 is next (4 bundles so far)"));
  log.forget([](std::size_t offset) { return offset == kRecords + kLine; });
  CHECK_THROWS(log.check(), ExchangeTimeout);
  write(sender, FailureKind::kCallOrder, Operation::kPush, 200);
  CHECK(has(message_of(log), "push of slot 1 (4 bundles so far): no bundle has begun"));
}

void an_abort_says_why() {
  const Buffer memory = allocate_host(4096);
  FailureLog log(memory, 0, kNote, 1);
  log.abort(3, "enough");
  log.abort(4, "too late");
  CHECK_THROWS(log.check(), Aborted);
  CHECK(message_of(log) == "rank 3 aborted the exchange: enough");
  log.close();
  log.abort(3, "nobody is there");
  CHECK(!log.failed());
  log.check();
}

// It may be called at any time, in any thread, while channels come and go and the fabric closes.
void an_abort_waits_for_nobody() {
  for (int i = 0; i < 200; ++i) {
    FailureLog log(allocate_host(4096), 0, kNote, 1);
    std::thread aborting([&] { log.abort(1, "enough"); });
    log.add_end(0, "up", kRecords, nullptr);
    log.forget([](std::size_t) { return true; });
    log.close();
    aborting.join();
  }
}

}  // namespace

int main() {
  the_first_failure_is_thrown();
  an_abort_says_why();
  an_abort_waits_for_nobody();
}
