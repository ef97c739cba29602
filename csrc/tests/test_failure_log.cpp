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

Buffer memory_for(int processes) { return allocate_host(FailureLog::nbytes(processes)); }

void check(const FailureLog& log) {
  log.check([](int) {});
}

std::string message_of(const FailureLog& log) {
  try {
    check(log);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// As a kernel would.
void write(const WaitContext& end, FailureKind kind, Operation operation, std::uint64_t time,
           int peer = 1) {
  FailureRecord& record = *end.record;
  record.operation = static_cast<std::uint64_t>(operation);
  record.slot = 1;
  record.expected = 0;
  record.seen = 4;
  record.peer = peer;
  record.time = time;
  record.kind = static_cast<std::uint64_t>(kind);
  *end.abort = 1;
}

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

void the_first_failure_is_thrown() {
  // Two processes, each with an end.
  const Buffer memory = memory_for(2);
  FailureLog log(memory, 0, 2, 1.5), other(memory, 1, 2, 1.5);
  unsigned claimed = 0;
  const WaitContext sender = log.add_end(0, "up", &claimed);
  const WaitContext receiver = other.add_end(1, "up", nullptr);
  CHECK(sender.claimed == &claimed && receiver.claimed == nullptr);
  CHECK(sender.deadline_ns == 1'500'000'000 && sender.abort == receiver.abort);
  check(log);
  CHECK(!log.failed());
  write(sender, FailureKind::kTimeout, Operation::kBegin, 200);
  CHECK(log.failed() && other.failed());
  CHECK_THROWS(check(log), ExchangeTimeout);
  CHECK(has(message_of(other), "rank 0, channel 'up', begin of slot 1: waited 1.5 s for rank 1"));
  write(receiver, FailureKind::kSlotOrder, Operation::kGet, 100);  // before it
  CHECK_THROWS(check(log), SlotOrderError);
  CHECK(has(message_of(log), "get of slot 1: slot 0 is next (4 bundles so far)"));
  other.remove_end(receiver.record);
  CHECK_THROWS(check(log), ExchangeTimeout);
  write(sender, FailureKind::kCallOrder, Operation::kPush, 200);
  CHECK(has(message_of(log), "push of slot 1 (4 bundles so far): no bundle has begun"));
  log.reset();
  CHECK(!log.failed());
  check(log);
  write(sender, FailureKind::kTimeout, Operation::kBegin, 200);
  CHECK(has(message_of(log), "channel 'up'"));  // what a record belongs to is still known
}

void the_end_of_a_chain_is_named() {
  FailureLog log(memory_for(1), 0, 1, 1);
  const WaitContext first = log.add_end(1, "0 to 1", nullptr);
  const WaitContext second = log.add_end(2, "1 to 2", nullptr);
  write(second, FailureKind::kTimeout, Operation::kGet, 100, 1);
  write(first, FailureKind::kTimeout, Operation::kGet, 200, 0);
  CHECK(has(message_of(log), "rank 2, channel '1 to 2'"));
  CHECK(has(message_of(log), "for rank 1") &&
        has(message_of(log), "waits, as others may, for rank 0"));
  // In a circle there is none.
  write(first, FailureKind::kTimeout, Operation::kGet, 200, 2);
  CHECK_THROWS(check(log), ExchangeTimeout);
}

void a_lost_process_comes_first() {
  FailureLog log(memory_for(1), 0, 1, 1);
  const WaitContext end = log.add_end(1, "0 to 1", nullptr);
  const auto lost = [](int rank) { throw ProcessLost(0, {rank}, "gone"); };
  CHECK_THROWS(log.check(lost), ProcessLost);
  log.end_waits();
  CHECK_THROWS(log.check(lost), ProcessLost);
  write(end, FailureKind::kTimeout, Operation::kGet, 100, 0);
  CHECK_THROWS(log.check(lost), ProcessLost);
  write(end, FailureKind::kSlotOrder, Operation::kGet, 100, 0);
  CHECK_THROWS(log.check(lost), SlotOrderError);
}

void an_abort_says_why() {
  FailureLog log(memory_for(1), 0, 1, 1);
  log.abort(3, "enough");
  log.abort(4, "too late");
  CHECK_THROWS(check(log), Aborted);
  CHECK(message_of(log) == "rank 3 aborted the exchange: enough");
  log.close();
  log.abort(3, "nobody is there");
  log.end_waits();
  CHECK(!log.failed());
  check(log);
}

// It may be called at any time, in any thread, while channels come and go and the fabric closes.
void an_abort_waits_for_nobody() {
  for (int i = 0; i < 200; ++i) {
    FailureLog log(memory_for(1), 0, 1, 1);
    std::thread aborting([&] { log.abort(1, "enough"); });
    const WaitContext end = log.add_end(0, "up", nullptr);
    log.remove_end(end.record);
    log.close();
    aborting.join();
  }
}

}  // namespace

int main() {
  the_first_failure_is_thrown();
  the_end_of_a_chain_is_named();
  a_lost_process_comes_first();
  an_abort_says_why();
  an_abort_waits_for_nobody();
}
