// Waits of other threads for what the courier carries.
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/interrupt.hpp"
#include "nccl_courier.hpp"

namespace asyncdiff {

void NcclCourier::wait(const std::function<bool()>& done,
                       const std::function<ExchangeTimeout()>& late) {
  wake();
  const auto limit = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                        std::chrono::duration<double>(deadline_));
  for (int looks = 1;; ++looks) {
    {
      const std::lock_guard lock(mutex_);
      if (done()) return;
    }
    if (looks % 1000 == 0) check_interrupt();
    if (const auto failed = error()) std::rethrow_exception(failed);
    if (failures_.failed()) throw Error("the exchange has failed or was aborted");
    if (Clock::now() > limit) throw late();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

std::uint64_t NcclCourier::wait_until_sent(NcclOutgoing& end) {
  std::uint64_t sent = 0;
  wait(
      [&] {
        std::size_t to = 0;
        bool whole = false;
        sent = end.messages;
        return !end.next(to, whole) && end.idle();
      },
      [&] { return end.timeout("commit", deadline_); });
  return sent;
}

void NcclCourier::wait_until_arrived(const NcclIncoming& end, std::uint64_t messages) {
  wait([&] { return end.messages == messages && end.idle(); },
       [&] { return end.timeout("get", deadline_); });
}

void NcclCourier::wait_and_tell(const std::function<bool()>& done,
                                const std::function<ExchangeTimeout()>& late) {
  try {
    wait(done, late);
  } catch (const ExchangeTimeout&) {
    fail(std::current_exception());
    wake();
    throw;
  }
}

void NcclCourier::wait_for(const NcclIncoming& end, std::uint64_t bundles) {
  std::uint64_t n = 0;
  std::uint64_t seen = 0;
  wait_and_tell(
      [&] {
        n = end.first + bundles;
        seen = end.bundles;
        return end.has_carried(n);
      },
      [&] {
        return ExchangeTimeout(
            {end.rank, end.peer, end.name, end.slot(n), n, seen, "get", end.peer}, deadline_);
      });
}

void NcclCourier::wait_free(const NcclOutgoing& end, std::uint64_t n) {
  const auto slots = static_cast<std::uint64_t>(end.slots);
  if (n <= slots) return;
  std::uint64_t needed = 0;
  std::uint64_t seen = 0;
  wait_and_tell(
      [&] {
        needed = end.first + n - slots;
        seen = load_word(end.credit);
        return reached(seen, needed);
      },
      [&] {
        return ExchangeTimeout(
            {end.rank, end.peer, end.name, end.slot(needed), needed, seen, "begin", end.peer},
            deadline_);
      });
}

}  // namespace asyncdiff
