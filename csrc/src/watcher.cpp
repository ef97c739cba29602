#include "watcher.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "background_thread.hpp"

namespace asyncdiff {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kBeatMilliseconds = 100;

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434  // on every architecture
#endif

// A descriptor that can be read from once the process has ended. -1: none can be had; -2: it has
// ended already, and its number may be another's.
int descriptor_of(const Identity& who) {
  const int out = static_cast<int>(syscall(SYS_pidfd_open, who.pid, 0));
  if (out < 0) return errno == ESRCH ? -2 : -1;
  if (is_anothers(who)) {
    close(out);
    return -2;
  }
  return out;
}

}  // namespace

Watcher::Watcher(Board board, std::vector<Identity> all, int own, double patience,
                 std::function<void(int)> gone)
    : board_(board),
      all_(std::move(all)),
      own_(own),
      patience_(patience),
      gone_(std::move(gone)),
      descriptors_(all_.size(), -1),
      watched_(all_.size(), false),
      stop_(eventfd(0, EFD_CLOEXEC)) {
  if (stop_ < 0) throw Error(std::string("making an event descriptor: ") + std::strerror(errno));
  const Identity& self = all_[static_cast<std::size_t>(own_)];
  for (std::size_t p = 0; p < all_.size(); ++p) {
    // A thread of this process may play another one, in tests.
    const bool same = all_[p].pid == self.pid && all_[p].pid_namespace == self.pid_namespace;
    const bool here = std::strcmp(all_[p].machine, self.machine) == 0;
    watched_[p] = static_cast<int>(p) != own_ && !same && here;
    if (!watched_[p]) continue;
    const bool known = self.pid_namespace != 0 && all_[p].pid_namespace == self.pid_namespace;
    if (known) descriptors_[p] = descriptor_of(all_[p]);
    if (descriptors_[p] == -1) board_.beats_wanted().store(1);
  }
}

void Watcher::start() {
  if (std::find(watched_.begin(), watched_.end(), true) == watched_.end()) return;
  thread_ = background_thread([this] { run(); });
}

Watcher::~Watcher() {
  if (thread_ != nullptr) {
    const std::uint64_t one = 1;
    while (write(stop_, &one, sizeof one) < 0 && errno == EINTR) {
    }
    thread_->join();
    delete thread_;
  }
  for (int descriptor : descriptors_) {
    if (descriptor >= 0) close(descriptor);
  }
  close(stop_);
}

bool Watcher::is_stopped(int process) const {
  const auto p = static_cast<std::size_t>(process);
  return descriptors_[p] >= 0 && stopped(all_[p].pid);
}

bool Watcher::has_ended(int process) const {
  return asyncdiff::has_ended(all_[static_cast<std::size_t>(process)],
                              all_[static_cast<std::size_t>(own_)]);
}

void Watcher::forget() { thread_ = nullptr; }  // not deleted: a thread that is not cannot be joined

void Watcher::run() {
  struct Beat {
    std::uint32_t seen = 0;
    Clock::time_point since = Clock::now();
  };
  std::vector<Beat> beats(all_.size());
  const auto patience = std::chrono::duration<double>(patience_);
  while (true) {
    std::vector<pollfd> polled = {{stop_, POLLIN, 0}};
    std::vector<std::size_t> whose = {0};
    for (std::size_t p = 0; p < all_.size(); ++p) {
      if (!watched_[p] || descriptors_[p] < 0) continue;
      polled.push_back({descriptors_[p], POLLIN, 0});
      whose.push_back(p);
    }
    const auto end = [&](std::size_t p) {
      watched_[p] = false;
      gone_(static_cast<int>(p));
    };
    for (std::size_t p = 0; p < all_.size(); ++p) {
      if (watched_[p] && descriptors_[p] == -2) end(p);
    }
    // Others may find that they need beats as long as the fabric is being made.
    const bool beating = !all_there_ || board_.beats_wanted().load() != 0;
    const int found = poll(polled.data(), polled.size(), beating ? kBeatMilliseconds : -1);
    if (polled[0].revents != 0) return;
    for (std::size_t i = 1; found > 0 && i < polled.size(); ++i) {
      if (polled[i].revents != 0) end(whose[i]);
    }
    if (!beating) continue;
    board_.member(own_).beats.fetch_add(1);
    for (std::size_t p = 0; p < all_.size(); ++p) {
      if (!watched_[p] || descriptors_[p] != -1) continue;
      const std::uint32_t seen = board_.member(static_cast<int>(p)).beats.load();
      if (seen != beats[p].seen) beats[p] = {seen, Clock::now()};
      if (Clock::now() - beats[p].since > patience) end(p);
    }
  }
}

}  // namespace asyncdiff
