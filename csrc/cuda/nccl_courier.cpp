#include "nccl_courier.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "background_thread.hpp"
#include "nccl_message.hpp"

namespace asyncdiff {

namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

// Between two looks at what kernels write: nothing wakes a thread for that. Right after there was
// something to do, all the time: bundles follow each other, and waking up takes as long as one of
// them. Then short for a while, as in a generation.
constexpr milliseconds kBusy{2};
constexpr microseconds kSoon{20};
constexpr milliseconds kLater{1};
constexpr milliseconds kWhile{200};
// While there is no channel.
constexpr milliseconds kIdle{100};
// Between two looks at a link that is carrying something.
constexpr milliseconds kLinkLooks{20};

// Of counts that another process tells.
void check_step(std::uint64_t from, std::uint64_t to, const NcclEnd& end) {
  if (to - from <= static_cast<std::uint64_t>(end.slots)) return;
  throw NcclError("channel '" + end.name + "': process " + std::to_string(end.process) +
                  " counts " + std::to_string(to) + " bundles after " + std::to_string(from));
}

}  // namespace

NcclCourier::NcclCourier(std::map<int, Wire> connections, FailureLog& failures,
                         double deadline_seconds, Events events)
    : failures_(failures),
      deadline_(deadline_seconds),
      events_(std::move(events)),
      wake_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (wake_ < 0) throw Error(std::string("making an event descriptor: ") + std::strerror(errno));
  for (auto& [process, wire] : connections) peers_.try_emplace(process, std::move(wire));
}

NcclCourier::~NcclCourier() {
  stop();
  ::close(wake_);
}

void NcclCourier::stop() {
  if (thread_ == nullptr) return;
  stop_ = true;
  wake();
  thread_->join();
  delete std::exchange(thread_, nullptr);
  const std::lock_guard lock(mutex_);
  for (auto& [process, peer] : peers_) {
    if (!peer.open) continue;
    peer.wire.put(kGoodbye, "");
    peer.wire.write();
  }
  peers_.clear();
  outgoing_.clear();
  incoming_.clear();
}

void NcclCourier::start() {
  thread_ = background_thread([this] { run(); });
}

void NcclCourier::forget() { thread_ = nullptr; }

void NcclCourier::add(std::shared_ptr<NcclOutgoing> end) {
  const std::lock_guard lock(mutex_);
  outgoing_[end->channel] = std::move(end);
  wake();
}

void NcclCourier::add(std::shared_ptr<NcclIncoming> end) {
  const std::lock_guard lock(mutex_);
  const std::pair key(end->process, end->channel);
  incoming_[key] = std::move(end);
  wake();
}

void NcclCourier::remove(const NcclEnd& end) {
  const std::lock_guard lock(mutex_);
  const auto mine = outgoing_.find(end.channel);
  if (mine != outgoing_.end() && mine->second.get() == &end) outgoing_.erase(mine);
  const auto theirs = incoming_.find({end.process, end.channel});
  if (theirs != incoming_.end() && theirs->second.get() == &end) incoming_.erase(theirs);
}

void NcclCourier::wake() {
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(wake_, &one, sizeof one);
}

void NcclCourier::reset(std::uint64_t first) {
  const std::lock_guard lock(mutex_);
  ++generation_;
  for (const auto& [channel, end] : outgoing_) {
    end->reset(first);
    end->tensor = 0;
    store_word(end->credit, first);
  }
  for (const auto& [key, end] : incoming_) {
    end->reset(first);
    end->told = first;
  }
}

std::exception_ptr NcclCourier::error() const {
  const std::lock_guard lock(error_mutex_);
  return error_;
}

void NcclCourier::fail(const std::exception_ptr& error) {
  {
    const std::lock_guard lock(error_mutex_);
    if (!failures_.failed()) error_ = error;
  }
  failures_.end_waits();
}

void NcclCourier::run() {
  prctl(PR_SET_TIMERSLACK, 1000UL);  // ns; else waits are 50 us longer
  if (events_.starting) events_.starting();
  bool ended = false;
  auto last = Clock::now();
  while (!stop_) {
    bool worked = false;
    if (!ended) {
      try {
        const std::lock_guard lock(mutex_);
        worked = work();
      } catch (const NcclError&) {
        fail(cause_of(std::current_exception()));
      } catch (...) {
        fail(std::current_exception());
      }
      if (events_.over()) failures_.end_waits();
      if (failures_.failed()) {
        ended = true;
        events_.failed();
      }
    }
    const auto now = Clock::now();
    if (worked) last = now;
    if (!ended && now - last < kBusy) {
      look_again();
    } else if (pause(!ended && now - last < kWhile)) {
      last = Clock::now();
    }
  }
}

std::exception_ptr NcclCourier::cause_of(const std::exception_ptr& error) {
  // Where a process is killed, its links and its connections end in any order.
  const auto until = Clock::now() + std::chrono::seconds(1);
  while (Clock::now() < until && !stop_) {
    if (events_.over()) return nullptr;
    {
      const std::lock_guard lock(mutex_);
      for (const auto& [process, peer] : peers_) {
        pollfd one{peer.wire.socket().descriptor(), POLLRDHUP, 0};
        if (peer.open && !peer.left && poll(&one, 1, 0) > 0) return events_.lost(process);
      }
    }
    std::this_thread::sleep_for(milliseconds(5));
  }
  return error;
}

bool NcclCourier::work() {
  bool worked = false;
  for (const auto& [channel, end] : outgoing_) worked = post(*end) || worked;
  for (const auto& [key, end] : incoming_) worked = tell(*end) || worked;
  for (auto& [process, peer] : peers_) {
    if (peer.speaks) worked = listen(process, peer) || worked;
  }
  for (auto& [process, peer] : peers_) write(process, peer);
  const auto now = Clock::now();
  const bool look = now - looked_ > kLinkLooks;
  if (look) looked_ = now;
  for (const auto& [channel, end] : outgoing_) watch(*end, "commit", now, look);
  for (const auto& [key, end] : incoming_) watch(*end, "get", now, look);
  return worked;
}

bool NcclCourier::post(NcclOutgoing& end) {
  bool worked = false;
  // Whoever has left receives nothing any more: begins will wait in vain.
  const auto peer = peers_.find(end.process);
  if (peer == peers_.end() || !peer->second.open) return false;
  std::size_t to = 0;
  bool whole = false;
  while (!failures_.failed() && end.next(to, whole)) {
    const std::uint64_t n = end.bundles + 1;
    // Said first: the other side has a way to go.
    say(end.process, whole ? kWhole : kPart, {generation_, n, to, end.channel, 0});
    end.link->send(end.staging + end.place(n) + end.part, to - end.part,
                   {nullptr, 0, end.carried, end.messages + 1});
    end.gave(to, whole);
    if (whole) end.tensor = 0;
    worked = true;
  }
  return worked;
}

bool NcclCourier::tell(NcclIncoming& end) {
  const std::uint64_t released = load_word(end.released);
  if (released == end.told) return false;
  end.told = released;
  say(end.process, kReleased, {generation_, released, 0, end.channel, 0});
  return true;
}

bool NcclCourier::listen(int process, Peer& peer) {
  bool worked = false;
  peer.speaks = false;
  while (peer.open) {
    const Progress progress = peer.wire.read();
    if (peer.wire.there()) {
      worked = true;
      const Frame frame = peer.wire.take();
      if (frame.kind == kGoodbye) {
        peer.left = true;
      } else {
        heard(process, frame);
      }
    } else if (progress == Progress::kEnded) {
      ended(process, peer);
    } else {
      break;
    }
  }
  return worked;
}

void NcclCourier::heard(int process, const Frame& frame) {
  const NcclMessage message = message_in(frame.payload);
  if (message.generation < generation_) return;  // said before the last reset
  const auto known = [&](bool so) {
    if (so) return;
    throw NcclError("process " + std::to_string(process) + " speaks of a channel that is not here");
  };
  if (frame.kind == kWhole || frame.kind == kPart) {
    const auto found = incoming_.find({process, message.channel});
    known(found != incoming_.end());
    arriving(*found->second, message.count, message.to, frame.kind == kWhole);
  } else if (frame.kind == kReleased) {
    const auto found = outgoing_.find(message.channel);
    // A channel is closed once all has arrived, released or not.
    if (found == outgoing_.end()) return;
    known(found->second->process == process);
    NcclOutgoing& end = *found->second;
    check_step(load_word(end.credit), message.count, end);
    store_word(end.credit, message.count);
  } else {
    throw NcclError("process " + std::to_string(process) + " says what nobody can read");
  }
}

void NcclCourier::arriving(NcclIncoming& end, std::uint64_t n, std::uint64_t to, bool whole) {
  check_step(load_word(end.released), n, end);
  if (n != end.bundles + 1 || to < end.part || to > end.nbytes || (whole && to != end.nbytes)) {
    throw NcclError("channel '" + end.name + "': process " + std::to_string(end.process) +
                    " sends bundle " + std::to_string(n) + " after " + std::to_string(end.bundles) +
                    ", up to byte " + std::to_string(to));
  }
  const auto last = static_cast<std::size_t>(to);
  end.link->receive(end.mailbox + end.place(n) + end.part, last - end.part,
                    {whole ? end.arrived : nullptr, n, end.carried, end.messages + 1});
  end.gave(last, whole);
}

void NcclCourier::watch(NcclEnd& end, const char* operation, Clock::time_point now, bool look) {
  const std::uint64_t carried = load_word(end.carried);
  if (carried != end.seen) {
    end.seen = carried;
    end.since = now;
  }
  if (carried == end.messages) return;
  if (look) end.link->check();
  if (now - end.since > std::chrono::duration<double>(deadline_)) {
    throw end.timeout(operation, deadline_);
  }
}

void NcclCourier::say(int process, char kind, const NcclMessage& message) {
  const auto found = peers_.find(process);
  if (found == peers_.end() || !found->second.open) return;
  found->second.wire.put(kind, bytes_of(message));
  write(process, found->second);
}

void NcclCourier::write(int process, Peer& peer) {
  if (peer.open && peer.wire.write() == Progress::kEnded) ended(process, peer);
}

void NcclCourier::ended(int process, Peer& peer) {
  peer.open = false;
  if (!peer.left) std::rethrow_exception(events_.lost(process));
}

void NcclCourier::look_again() {
  std::this_thread::yield();
  const std::lock_guard lock(mutex_);
  for (auto& [process, peer] : peers_) peer.speaks = true;
}

bool NcclCourier::pause(bool busy) {
  std::vector<pollfd> all{{wake_, POLLIN, 0}};
  std::chrono::nanoseconds longest = busy ? std::chrono::nanoseconds(kSoon) : kLater;
  // After a failure nobody reads any more, and what comes does not wake.
  const bool failed = failures_.failed();
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [process, peer] : peers_) {
      const int events = POLLIN | (peer.wire.written() ? 0 : POLLOUT);
      const int descriptor = peer.open && !failed ? peer.wire.socket().descriptor() : -1;
      all.push_back({descriptor, static_cast<short>(events), 0});
    }
    if (failed || (outgoing_.empty() && incoming_.empty())) longest = kIdle;
  }
  const timespec time{0, static_cast<long>(longest.count())};
  if (ppoll(all.data(), all.size(), &time, nullptr) <= 0) return false;
  {
    const std::lock_guard lock(mutex_);
    std::size_t place = 1;
    for (auto& [process, peer] : peers_) peer.speaks = all[place++].revents != 0;
  }
  std::uint64_t count = 0;
  return all[0].revents != 0 && ::read(wake_, &count, sizeof count) > 0;
}

}  // namespace asyncdiff
