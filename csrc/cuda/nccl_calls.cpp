#include "nccl_calls.hpp"

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "asyncdiff/errors.hpp"
#include "background_thread.hpp"

namespace asyncdiff {

namespace {

using Clock = std::chrono::steady_clock;

// Never destroyed: threads may be in it when the process ends.
struct Calls {
  std::mutex mutex;
  std::condition_variable changed;
  int count = 0;
};

Calls& calls() {
  static auto* all = new Calls;
  return *all;
}

// A call that somebody waits for, or no longer does.
struct Call {
  std::mutex mutex;
  std::condition_variable changed;
  bool done = false, given_up = false;
  int result = 0;
};

bool begin(std::function<void()> call) {
  Calls& all = calls();
  // Not while the process ends: what NCCL uses goes then. Handlers run the last one first, and
  // those of what it uses are there already.
  static const pid_t process = getpid();  // a forked child has none of these threads
  static const int registered = std::atexit([] {
    if (getpid() == process) wait_for_nccl_calls(Clock::now() + std::chrono::seconds(2));
  });
  static_cast<void>(registered);
  const auto leave = [&all] {
    const std::lock_guard lock(all.mutex);
    --all.count;
    all.changed.notify_all();
  };
  {
    const std::lock_guard lock(all.mutex);
    ++all.count;
  }
  try {
    const std::unique_ptr<std::thread> thread(background_thread([call = std::move(call), leave] {
      call();
      leave();
    }));
    thread->detach();
    return true;
  } catch (...) {
    leave();
    return false;
  }
}

}  // namespace

void start_nccl_call(std::function<void()> call) noexcept {
  try {
    begin(std::move(call));
  } catch (...) {
  }
}

int nccl_call(const std::string& what, const NcclLimits& limits, std::function<int()> call,
              std::function<void()> late) {
  const auto one = std::make_shared<Call>();
  const bool begun = begin([one, call = std::move(call), late] {
    const int result = call();
    std::unique_lock lock(one->mutex);
    one->result = result;
    one->done = true;
    one->changed.notify_all();
    const bool given_up = one->given_up;
    lock.unlock();
    if (given_up) late();
  });
  if (!begun) throw NcclError(what + ": there can be no further thread");
  const auto limit = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                        std::chrono::duration<double>(limits.seconds));
  std::unique_lock lock(one->mutex);
  try {
    while (!one->changed.wait_for(lock, std::chrono::milliseconds(1), [&] { return one->done; })) {
      lock.unlock();
      if (limits.check) limits.check();
      if (Clock::now() > limit) throw NcclError(nccl_is_late(what, limits.seconds));
      lock.lock();
    }
  } catch (...) {
    if (!lock.owns_lock()) lock.lock();
    one->given_up = true;
    // It may have returned meanwhile.
    if (one->done) start_nccl_call(std::move(late));
    throw;
  }
  return one->result;
}

bool wait_for_nccl_calls(Clock::time_point limit) {
  Calls& all = calls();
  std::unique_lock lock(all.mutex);
  return all.changed.wait_until(lock, limit, [&] { return all.count == 0; });
}

std::string nccl_is_late(const std::string& what, double seconds) {
  return what + ": NCCL is not done after " + std::to_string(static_cast<int>(seconds)) +
         " s; NCCL_DEBUG=INFO says what it waits for, NCCL_SOCKET_IFNAME which network interface "
         "it "
         "takes";
}

}  // namespace asyncdiff
