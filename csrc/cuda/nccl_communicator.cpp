#include "nccl_communicator.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "asyncdiff/errors.hpp"
#include "background_thread.hpp"

namespace asyncdiff {

namespace {

using Clock = std::chrono::steady_clock;

// Most blocks of a kernel that carries a bundle, each of which takes a multiprocessor from what
// computes beside it. Over a network NCCL takes a few anyway, which saturate it; more are of use
// where hosts share an NVLink domain.
constexpr int kMostBlocks = 32;
constexpr int kBytes = 1;  // NCCL's number for unsigned bytes
constexpr std::chrono::milliseconds kGuardLooks{50};

std::int64_t now() { return Clock::now().time_since_epoch().count(); }

const char* sending(bool sends) { return sends ? "sending a bundle" : "receiving a bundle"; }

// Looks after all communicators of the process. Never destroyed: its thread does not end.
class Guard {
 public:
  void add(NcclCommunicator* one) {
    const std::lock_guard lock(mutex_);
    all_.insert(one);
    if (thread_ != nullptr) return;
    thread_ = background_thread([this] {
      for (;; std::this_thread::sleep_for(kGuardLooks)) {
        const std::lock_guard looking(mutex_);
        for (NcclCommunicator* each : all_) each->look_after();
      }
    });
  }
  void remove(NcclCommunicator* one) {
    const std::lock_guard lock(mutex_);
    all_.erase(one);
  }

 private:
  std::mutex mutex_;
  std::set<NcclCommunicator*> all_;
  std::thread* thread_ = nullptr;
};

Guard& guard() {
  static auto* one = new Guard;
  return *one;
}

// The result of making one, which its thread may outlive.
struct Made {
  NcclHandle* handle = nullptr;
  NcclConfig config;
};

}  // namespace

NcclCommunicator::NcclCommunicator(const NcclLibrary& library, const NcclUniqueId& id, int place,
                                   std::function<void()> enter, const NcclLimits& making)
    : library_(library),
      other_(place == kSender ? kReceiver : kSender),
      enter_(std::move(enter)),
      limits_(making) {
  const auto made = std::make_shared<Made>();
  made->config.blocking = 1;
  made->config.fewest_blocks = 1;
  made->config.most_blocks = kMostBlocks;
  const std::string what = "connecting two ranks";
  const int result = nccl_call(
      what, making,
      [made, enter = enter_, all = &library_, id, place] {
        enter();
        return all->make(&made->handle, 2, id, place, &made->config);
      },
      [made, all = &library_] {
        if (made->handle != nullptr) all->abort(made->handle);
      });
  library_.check(result, what);
  handle_ = made->handle;
  guard().add(this);
}

NcclCommunicator::~NcclCommunicator() {
  guard().remove(this);
  abort();
}

template <class Call>
void NcclCommunicator::carry(const char* what, Call call) {
  NcclHandle* const handle = handle_;
  if (handle == nullptr) throw NcclError(std::string(what) + ": the connection was given up");
  int result = kNcclSuccess;
  if (connected_) {
    since_ = now();
    result = call(handle);
    since_ = 0;
  } else {
    const auto entered = [enter = enter_, call, handle] {
      enter();
      return call(handle);
    };
    result = nccl_call(what, limits_, entered, [] {});
    connected_ = true;
  }
  library_.check(result, what, handle);
}

void NcclCommunicator::send(const void* data, std::size_t nbytes, void* stream) {
  carry("sending a bundle", [=, to = other_, call = library_.send](NcclHandle* handle) {
    return call(data, nbytes, kBytes, to, handle, stream);
  });
}

void NcclCommunicator::receive(void* data, std::size_t nbytes, void* stream) {
  carry("receiving a bundle", [=, from = other_, call = library_.receive](NcclHandle* handle) {
    return call(data, nbytes, kBytes, from, handle, stream);
  });
}

void NcclCommunicator::check() const {
  NcclHandle* const handle = handle_;
  if (handle == nullptr) return;
  int state = kNcclSuccess;
  const std::string what = "exchanging bundles";
  library_.check(library_.async_error(handle, &state), what, handle);
  library_.check(state, what, handle);
}

void NcclCommunicator::look_after() noexcept {
  const std::int64_t since = since_;
  if (since == 0) return;
  const auto taken = std::chrono::duration<double>(Clock::duration(now() - since));
  if (taken < kGuardLooks) return;
  bool useless = taken.count() > limits_.seconds;
  try {
    if (limits_.check) limits_.check();
  } catch (...) {
    useless = true;
  }
  if (useless) abort();
}

void NcclCommunicator::close() {
  NcclHandle* const handle = handle_.exchange(nullptr);
  if (handle == nullptr) return;
  try {
    nccl_call(
        "giving up a connection", limits_,
        [handle, enter = enter_, all = &library_] {
          enter();
          const int result = all->finalize(handle);
          return result == kNcclSuccess ? all->destroy(handle) : all->abort(handle);
        },
        [] {});
  } catch (...) {  // the other side has gone without it, or will not come
  }
}

void NcclCommunicator::abort() noexcept {
  NcclHandle* const handle = handle_.exchange(nullptr);
  if (handle == nullptr) return;
  start_nccl_call([all = &library_, handle] { all->abort(handle); });
}

}  // namespace asyncdiff
