#include "nccl_communicator.hpp"

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

namespace {

using Clock = std::chrono::steady_clock;

// Most blocks of a kernel that carries a bundle, each of which takes a multiprocessor from what
// computes beside it. Over a network NCCL takes a few anyway, which saturate it; more are of use
// where hosts share an NVLink domain.
constexpr int kMostBlocks = 32;
constexpr int kBytes = 1;  // NCCL's number for unsigned bytes

Clock::time_point after(double seconds) {
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// Calls that may wait: for other work of the device, or, where a peer is gone, for nobody knows
// what. Never destroyed: threads may be in it when the process ends.
struct Departures {
  std::mutex mutex;
  std::condition_variable changed;
  int count = 0;

  template <class Call>
  void start(Call call) noexcept {
    {
      const std::lock_guard lock(mutex);
      ++count;
    }
    const auto done = [this] {
      const std::lock_guard lock(mutex);
      --count;
      changed.notify_all();
    };
    try {
      std::thread([call, done] {
        call();
        done();
      }).detach();
    } catch (...) {
      done();  // no thread can be had: the process is about to end anyway
    }
  }
};

Departures& departures() {
  static auto* all = new Departures;
  return *all;
}

}  // namespace

NcclCommunicator::NcclCommunicator(const NcclLibrary& library, const NcclUniqueId& id, int place,
                                   const Limits& making)
    : library_(library), other_(place == kSender ? kReceiver : kSender), limits_(making) {
  NcclConfig config;
  config.blocking = 0;
  config.fewest_blocks = 1;
  config.most_blocks = kMostBlocks;
  const std::string what = "connecting two ranks";
  const int result = library_.make(&handle_, 2, id, place, &config);
  try {
    settle(result, what);
  } catch (...) {
    abort();
    throw;
  }
}

NcclCommunicator::~NcclCommunicator() { abort(); }

void NcclCommunicator::settle(int result, const std::string& what) {
  const auto begun = Clock::now();
  const auto limit = after(limits_.seconds);
  while (result == kNcclInProgress || result == kNcclSuccess) {
    // Also after a success: NCCL may still be at it.
    int state = kNcclSuccess;
    result = library_.async_error(handle_, &state);
    if (result == kNcclSuccess) result = state;
    if (result == kNcclSuccess) return;
    if (result != kNcclInProgress) break;
    if (limits_.check) limits_.check();
    if (Clock::now() > limit) {
      throw NcclError(what + ": NCCL is not done after " +
                      std::to_string(static_cast<int>(limits_.seconds)) +
                      " s; NCCL_DEBUG=INFO says what it waits for, NCCL_SOCKET_IFNAME which "
                      "network interface it takes");
    }
    // A message is on its way in microseconds; making a communicator takes a second.
    if (Clock::now() - begun < std::chrono::milliseconds(1)) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }
  library_.check(result, what, handle_);
}

void NcclCommunicator::send(const void* data, std::size_t nbytes, void* stream) {
  if (handle_ == nullptr) throw NcclError("sending a bundle: the connection was given up");
  settle(library_.send(data, nbytes, kBytes, other_, handle_, stream), "sending a bundle");
}

void NcclCommunicator::receive(void* data, std::size_t nbytes, void* stream) {
  if (handle_ == nullptr) throw NcclError("receiving a bundle: the connection was given up");
  settle(library_.receive(data, nbytes, kBytes, other_, handle_, stream), "receiving a bundle");
}

void NcclCommunicator::check() const {
  if (handle_ == nullptr) return;
  int state = kNcclSuccess;
  const std::string what = "exchanging bundles";
  library_.check(library_.async_error(handle_, &state), what, handle_);
  library_.check(state, what, handle_);
}

void NcclCommunicator::close() {
  if (handle_ == nullptr) return;
  try {
    settle(library_.finalize(handle_), "giving up a connection");
  } catch (...) {
    abort();  // the other side has gone without it, or will not come
    return;
  }
  NcclHandle* const handle = std::exchange(handle_, nullptr);
  departures().start([library = &library_, handle] { library->destroy(handle); });
  wait_for_all(after(limits_.seconds));
}

void NcclCommunicator::abort() noexcept {
  NcclHandle* const handle = std::exchange(handle_, nullptr);
  if (handle == nullptr) return;
  departures().start([library = &library_, handle] { library->abort(handle); });
}

bool NcclCommunicator::wait_for_all(Clock::time_point limit) {
  Departures& all = departures();
  std::unique_lock lock(all.mutex);
  return all.changed.wait_until(lock, limit, [&] { return all.count == 0; });
}

}  // namespace asyncdiff
