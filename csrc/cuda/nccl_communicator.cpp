#include "nccl_communicator.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <functional>
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
// where hosts share an NVLink domain: 60 MB take half as long again with 16.
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

// Calls of NCCL on one communicator must not overlap; an abort may come at any time, and ends them.
struct NcclCommunicator::State {
  std::timed_mutex calls;
  std::atomic<NcclHandle*> handle{nullptr};  // null: there is none any more
  // What it is split from, which is needed as long: where that is destroyed first, messages get
  // stuck (NCCL 2.28).
  NcclHandle* parent = nullptr;
};

NcclCommunicator::NcclCommunicator(const NcclLibrary& library, const NcclUniqueId& id, int place,
                                   const Limits& making)
    : library_(library),
      state_(std::make_shared<State>()),
      other_(place == kSender ? kReceiver : kSender),
      limits_(making) {
  NcclConfig config;
  config.blocking = 0;
  config.fewest_blocks = 1;
  config.most_blocks = kMostBlocks;
  const std::string what = "connecting two ranks";
  NcclHandle* made = nullptr;
  const int result = library_.make(&made, 2, id, place, &config);
  state_->handle = made;
  try {
    settle(made, result, what);
    // This one does nothing in the thread that calls, and so the making could be called off; but
    // each message would begin a thread, which takes longer than to enqueue it. One that is split
    // from it may be of the other kind.
    config.blocking = 1;
    NcclHandle* direct = nullptr;
    settle(made, library_.split(made, 0, place, &direct, &config), what);
    state_->parent = made;
    state_->handle = direct;
  } catch (...) {
    abort();
    throw;
  }
}

NcclCommunicator::~NcclCommunicator() { abort(); }

void NcclCommunicator::wait_until(const std::function<bool()>& done, const std::string& what) {
  const auto begun = Clock::now();
  const auto limit = after(limits_.seconds);
  while (!done()) {
    if (limits_.check) limits_.check();
    if (Clock::now() > limit) {
      throw NcclError(what + ": NCCL is not done after " +
                      std::to_string(static_cast<int>(limits_.seconds)) +
                      " s; NCCL_DEBUG=INFO says what it waits for, NCCL_SOCKET_IFNAME which "
                      "network interface it takes");
    }
    if (Clock::now() - begun < std::chrono::milliseconds(1)) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }
}

void NcclCommunicator::settle(NcclHandle* handle, int result, const std::string& what) {
  library_.check(result, what, handle);
  // Also after a success: NCCL may still be at it.
  wait_until(
      [&] {
        int state = kNcclSuccess;
        library_.check(library_.async_error(handle, &state), what, handle);
        library_.check(state, what, handle);
        return state == kNcclSuccess;
      },
      what);
}

void NcclCommunicator::exchange_first(void* data, std::size_t nbytes, void* stream,
                                      const std::function<void()>& starting) {
  struct Call {
    std::atomic<bool> over{false};
    int result = -1;
  };
  const auto call = std::make_shared<Call>();
  const std::string what = "the first message between two ranks";
  departures().start([all = &library_, state = state_, other = other_, call, data, nbytes, stream,
                      starting] {
    const std::lock_guard lock(state->calls);
    starting();
    NcclHandle* const handle = state->handle;
    if (handle != nullptr) {
      call->result = other == kReceiver ? all->send(data, nbytes, kBytes, other, handle, stream)
                                        : all->receive(data, nbytes, kBytes, other, handle, stream);
    }
    call->over = true;
  });
  try {
    wait_until([&] { return call->over.load(); }, what);
    library_.check(call->result, what, state_->handle);
  } catch (...) {
    abort();
    throw;
  }
}

void NcclCommunicator::send(const void* data, std::size_t nbytes, void* stream) {
  const std::lock_guard lock(state_->calls);
  NcclHandle* const handle = state_->handle;
  if (handle == nullptr) throw NcclError("sending a bundle: the connection was given up");
  library_.check(library_.send(data, nbytes, kBytes, other_, handle, stream), "sending a bundle",
                 handle);
}

void NcclCommunicator::receive(void* data, std::size_t nbytes, void* stream) {
  const std::lock_guard lock(state_->calls);
  NcclHandle* const handle = state_->handle;
  if (handle == nullptr) throw NcclError("receiving a bundle: the connection was given up");
  library_.check(library_.receive(data, nbytes, kBytes, other_, handle, stream),
                 "receiving a bundle", handle);
}

void NcclCommunicator::check() const {
  const std::lock_guard lock(state_->calls);
  NcclHandle* const handle = state_->handle;
  if (handle == nullptr) return;
  int state = kNcclSuccess;
  const std::string what = "exchanging bundles";
  library_.check(library_.async_error(handle, &state), what, handle);
  library_.check(state, what, handle);
}

void* NcclCommunicator::enroll(void* data, std::size_t nbytes) {
  const std::lock_guard lock(state_->calls);
  NcclHandle* const handle = state_->handle;
  void* out = nullptr;
  if (handle == nullptr || library_.enroll(handle, data, nbytes, &out) != kNcclSuccess) return {};
  return out;
}

void NcclCommunicator::withdraw(void* enrolled, std::function<void()> then) noexcept {
  // The other side's NCCL is asked to forget it, too.
  departures().start([all = &library_, state = state_, enrolled, then = std::move(then)] {
    {
      const std::lock_guard lock(state->calls);
      NcclHandle* const handle = state->handle;
      if (handle != nullptr && enrolled != nullptr) all->withdraw(handle, enrolled);
    }
    then();
  });
}

void NcclCommunicator::close() {
  std::unique_lock lock(state_->calls, after(limits_.seconds));
  if (!lock.owns_lock()) return abort();
  NcclHandle* const handle = state_->handle.exchange(nullptr);
  if (handle == nullptr) return;
  departures().start([all = &library_, handle, parent = state_->parent] {
    all->finalize(handle);
    all->destroy(handle);
    all->destroy(parent);
  });
  wait_for_all(after(limits_.seconds));
}

void NcclCommunicator::abort() noexcept {
  NcclHandle* const handle = state_->handle.exchange(nullptr);
  if (handle == nullptr) return;
  departures().start([all = &library_, handle, parent = state_->parent] {
    all->abort(handle);
    if (parent != nullptr) all->abort(parent);
  });
}

bool NcclCommunicator::wait_for_all(Clock::time_point limit) {
  Departures& all = departures();
  std::unique_lock lock(all.mutex);
  return all.changed.wait_until(lock, limit, [&] { return all.count == 0; });
}

}  // namespace asyncdiff
