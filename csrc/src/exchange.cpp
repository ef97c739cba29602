// How processes make a call together: each sends all others its bytes, through rings of memory.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "assembly.hpp"
#include "asyncdiff/errors.hpp"
#include "relay.hpp"
#include "ring.hpp"

namespace asyncdiff {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kLook = std::chrono::milliseconds(250);  // between looks at who is stopped
constexpr std::size_t kMost = std::size_t{1} << 30;     // bytes of a message

std::string list_of(const std::vector<int>& numbers) {
  std::string out;
  for (int number : numbers) out += (out.empty() ? "" : " ") + std::to_string(number);
  return "(" + out + ")";
}

std::string framed(const std::string& message) {
  const std::uint64_t size = message.size();
  return std::string(reinterpret_cast<const char*>(&size), sizeof size) + message;
}

}  // namespace

// One call: what is still to be sent to, and received from, each of the others.
class Assembly::Call {
 public:
  Call(Assembly& all, const std::vector<int>& members, const std::string& mine, std::string what)
      : all_(all), what_(std::move(what)) {
    // For the others to compare, so that nobody takes a message of another call for one of this.
    members_ = list_of(members);
    out_ = framed(members_ + "\n" + what_ + "\n" + mine);
    for (int p : members) {
      if (p == all_.process_) continue;
      peers_.emplace_back();
      peers_.back().process = p;
      peers_.back().steps = all_.step(p).count.load(std::memory_order_acquire);
    }
  }

  void run(double seconds) {
    const auto patience =
        std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    Signal& changed = all_.board_.member(all_.process_).changed;
    while (true) {
      bool moved = false;
      bool done = true;
      for (Peer& peer : peers_) {
        if (move(peer)) moved = true;
        if (!peer.complete(out_.size())) done = false;
      }
      if (done) return;
      all_.check();  // only now: who is done may have ended
      if (moved) continue;
      const auto look = std::min<Clock::time_point>(heard() + patience, Clock::now() + kLook);
      if (!changed.wait([this] { return ready(); }, look)) {
        const auto limit = Clock::now() - patience;
        if (heard() <= limit) late(seconds, limit);
        find_stopped();
      }
      check_left();
    }
  }

  // What each has sent. Throws InvalidArgument where another process is in a call of others.
  std::vector<std::string> texts(const std::string& mine) const {
    std::vector<std::string> out(static_cast<std::size_t>(all_.count_));
    out[static_cast<std::size_t>(all_.process_)] = mine;
    std::string others;
    for (const Peer& peer : peers_) {
      const std::size_t members = peer.text.find('\n');
      const std::size_t what = peer.text.find('\n', members + 1);
      if (what == std::string::npos || peer.text.substr(0, members) != members_) {
        const std::string call = what == std::string::npos
                                     ? " sends what nobody can read"
                                     : " is at '" +
                                           peer.text.substr(members + 1, what - members - 1) +
                                           "' of processes " + peer.text.substr(0, members);
        others += all_.name_of(peer.process) + call + "; ";
      } else {
        out[static_cast<std::size_t>(peer.process)] = peer.text.substr(what + 1);
      }
    }
    if (others.empty()) return out;
    all_.end(BoardNote::kDiffered, all_.process_,
             "processes differ in a call that they have to make together: " + others +
                 all_.name_of(all_.process_) + " is at '" + what_ + "' of processes " + members_ +
                 ". Any two processes make the calls that they share in the same order");
    all_.check();
    return out;
  }

 private:
  struct Peer {
    int process = -1;
    std::size_t sent = 0;
    std::uint64_t size = 0;
    std::size_t size_bytes = 0;  // of `size` that have come
    std::size_t received = 0;
    std::string text;
    int looks = 0;                           // in a row at which it was stopped
    std::uint32_t steps = 0;                 // that it had said,
    Clock::time_point heard = Clock::now();  // and when the last of them, or this call, was there

    bool whole() const { return size_bytes == sizeof size && received == size; }
    bool complete(std::size_t to_send) const { return sent == to_send && whole(); }
  };

  BoardRing& to(const Peer& peer) const { return all_.board_.ring(all_.process_, peer.process); }
  BoardRing& from(const Peer& peer) const { return all_.board_.ring(peer.process, all_.process_); }

  // Sends and receives what can be at once. Whether that was anything.
  bool move(Peer& peer) {
    std::size_t moved = 0;
    if (peer.sent < out_.size()) {
      const std::size_t count =
          write_some(to(peer), out_.data() + peer.sent, out_.size() - peer.sent);
      peer.sent += count;
      moved += count;
    }
    if (peer.size_bytes < sizeof peer.size) {
      const std::size_t count =
          read_some(from(peer), reinterpret_cast<char*>(&peer.size) + peer.size_bytes,
                    sizeof peer.size - peer.size_bytes);
      peer.size_bytes += count;
      moved += count;
      if (peer.size_bytes == sizeof peer.size) {
        if (peer.size > kMost) throw Error("a message of " + std::to_string(peer.size) + " bytes");
        peer.text.resize(static_cast<std::size_t>(peer.size));
      }
    }
    if (peer.size_bytes == sizeof peer.size && peer.received < peer.size) {
      const std::size_t count =
          read_some(from(peer), peer.text.data() + peer.received, peer.text.size() - peer.received);
      peer.received += count;
      moved += count;
    }
    if (moved > 0) all_.ring_changed(peer.process);
    return moved > 0;
  }

  bool ready() const {
    if (all_.over()) return true;
    return std::any_of(peers_.begin(), peers_.end(), [this](const Peer& peer) {
      if (peer.complete(out_.size())) return false;
      return (peer.sent < out_.size() && room_in(to(peer)) > 0) ||
             (!peer.whole() && bytes_in(from(peer)) > 0) || all_.left(peer.process);
    });
  }

  // What a process sent before it left can still be read.
  void check_left() {
    for (const Peer& peer : peers_) {
      if (peer.complete(out_.size()) || !all_.left(peer.process)) continue;
      if (!peer.whole() && bytes_in(from(peer)) > 0) continue;
      if (peer.whole() && room_in(to(peer)) > 0) continue;
      all_.lost_because_left(peer.process);
    }
  }

  // Whoever is stopped will not come, however long the others are willing to wait for work. (On
  // another host a process that is stopped says nothing any more, which the relay notices.)
  void find_stopped() {
    for (Peer& peer : peers_) {
      if (peer.complete(out_.size()) || !all_.watcher_->is_stopped(peer.process)) {
        peer.looks = 0;
      } else if (std::chrono::duration<double>(++peer.looks * kLook).count() > all_.deadline_) {
        all_.end(BoardNote::kLate, peer.process,
                 all_.name_of(peer.process) + " is stopped, by a signal (SIGSTOP, Ctrl-Z) or a " +
                     "debugger, while " + all_.name_of(all_.process_) + " waits at '" + what_ +
                     "' for it");
        all_.check();
      }
    }
  }

  // When that one was heard of for which that is longest ago.
  Clock::time_point heard() {
    Clock::time_point out = Clock::time_point::max();
    for (Peer& peer : peers_) {
      if (peer.complete(out_.size())) continue;
      const std::uint32_t steps = all_.step(peer.process).count.load(std::memory_order_acquire);
      if (steps != peer.steps) peer.heard = Clock::now();
      peer.steps = steps;
      out = std::min(out, peer.heard);
    }
    return out;
  }

  [[noreturn]] void late(double seconds, Clock::time_point limit) {
    int first = -1;
    std::string missing;
    for (const Peer& peer : peers_) {
      if (peer.complete(out_.size()) || peer.heard > limit) continue;
      if (first < 0) first = peer.process;
      const std::string doing = all_.step(peer.process).text();
      missing += (missing.empty() ? "" : ", ") + all_.name_of(peer.process) +
                 (doing.empty() ? "" : " (whose last word was '" + doing + "')");
    }
    char waited[32];
    std::snprintf(waited, sizeof waited, "%g s", seconds);
    all_.end(BoardNote::kLate, first,
             all_.name_of(all_.process_) + " waited " + waited + " at '" + what_ + "' for " +
                 missing + ", which did not make the same call in time");
    all_.check();
    throw Error("unreachable");
  }

  Assembly& all_;
  std::string what_;
  std::string members_;
  std::string out_;
  std::vector<Peer> peers_;
};

std::vector<std::string> Assembly::exchange(const std::vector<int>& members,
                                            const std::string& mine, const std::string& what,
                                            double seconds) {
  check_own();
  const std::lock_guard lock(calls_);
  if (left(process_)) throw Error("the fabric is closed");
  check();
  Call call(*this, members, mine, what);
  try {
    call.run(seconds);
  } catch (...) {
    // Others wait for the rest of what this process sends: an interrupt, or no memory.
    if (!over()) end(BoardNote::kGaveUp, process_, name_of(process_) + " gave up '" + what + "'");
    throw;
  }
  return call.texts(mine);
}

}  // namespace asyncdiff
