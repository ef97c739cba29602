#include "relay.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "background_thread.hpp"
#include "door.hpp"
#include "ring.hpp"

namespace asyncdiff {

namespace {

// Kinds of messages between hosts.
constexpr char kRing = 'r', kLeft = 'e', kNote = 'n', kTold = 'f', kStep = 's', kBeat = 'b';

// Seconds that a process which leaves, or ends, takes to say so.
constexpr double kGoodbye = 1;

void signal_event(int descriptor) {
  const std::uint64_t one = 1;
  while (write(descriptor, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

}  // namespace

Relay::Relay(Board board, int own, std::map<int, Wire> connections, double patience, Events events)
    : board_(board),
      own_(own),
      patience_(patience),
      events_(std::move(events)),
      wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (wake_ < 0) throw Error(std::string("making an event descriptor: ") + std::strerror(errno));
  for (auto& [p, wire] : connections) peers_.emplace(p, std::move(wire));
}

void Relay::start() {
  if (peers_.empty()) return;
  thread_ = background_thread([this] { run(); });
}

Relay::~Relay() {
  if (thread_ != nullptr) {
    stop_ = true;
    signal_event(wake_);
    thread_->join();
    delete thread_;
    // A child that was forked may have these sockets open, too.
    for (auto& [p, peer] : peers_) shutdown(peer.wire.socket().descriptor(), SHUT_WR);
  }
  close(wake_);
}

void Relay::forget() { thread_ = nullptr; }  // not deleted: a thread that is not cannot be joined

void Relay::ring_changed() { signal_event(wake_); }

void Relay::say(char kind, const std::string& payload) {
  if (peers_.empty()) return;
  {
    const std::lock_guard lock(mutex_);
    outbox_.emplace_back(kind, payload);
  }
  signal_event(wake_);
}

void Relay::say_left() {
  say(kLeft, "");
  // Who ends next, without a destructor, has said it.
  const Clock::time_point limit = after(kGoodbye);
  while (thread_ != nullptr && !left_said_ && Clock::now() < limit) usleep(200);
}

void Relay::say_note(const std::string& note) { say(kNote, note); }

void Relay::tell(const std::string& text) { say(kTold, text); }

void Relay::say_step(const std::string& text) { say(kStep, text); }

void Relay::run() {
  const double beat = patience_ / 4;
  Clock::time_point next_beat = Clock::now();
  Clock::time_point stop_limit = Clock::time_point::max();
  while (true) {
    collect();
    if (Clock::now() >= next_beat) {
      for (auto& [p, peer] : peers_) {
        if (peer.open) peer.wire.put(kBeat, "");
      }
      next_beat = after(beat);
    }
    for (auto& [p, peer] : peers_) send(p, peer);
    if (stop_) {
      stop_limit = std::min(stop_limit, after(kGoodbye));
      if (all_written() || Clock::now() >= stop_limit) return;
    }
    std::vector<pollfd> polled = {{wake_, POLLIN, 0}};
    std::vector<int> whose = {own_};
    for (auto& [p, peer] : peers_) {
      if (!peer.open) continue;
      const int events = peer.wire.written() ? POLLIN : POLLIN | POLLOUT;
      polled.push_back({peer.wire.socket().descriptor(), static_cast<short>(events), 0});
      whose.push_back(p);
    }
    const auto left =
        std::chrono::duration_cast<std::chrono::milliseconds>(next_beat - Clock::now());
    const auto wait = std::clamp<std::int64_t>(left.count() + 1, 0, stop_ ? 20 : 60000);
    poll(polled.data(), polled.size(), static_cast<int>(wait));
    std::uint64_t events = 0;
    while (read(wake_, &events, sizeof events) < 0 && errno == EINTR) {
    }
    for (std::size_t i = 1; i < polled.size(); ++i) {
      if ((polled[i].revents & ~POLLOUT) != 0) receive(whose[i], peers_.at(whose[i]));
    }
    for (auto& [p, peer] : peers_) {
      if (!peer.open || Clock::now() - peer.heard < std::chrono::duration<double>(patience_)) {
        continue;
      }
      end(p, peer,
          "said nothing for " + seconds_text(patience_) +
              ": its host is down, or cannot be reached any more, or it was stopped");
    }
  }
}

// What was said before something was written to a ring is sent before it: rings are looked at first
// and sent last. Only that this process has left comes after all that it wrote.
void Relay::collect() {
  std::map<int, std::size_t> written;
  const auto look = [&] {
    for (auto& [p, peer] : peers_) written[p] = bytes_in(board_.ring(own_, p));
  };
  look();
  std::vector<std::pair<char, std::string>> said;
  {
    const std::lock_guard lock(mutex_);
    said.swap(outbox_);
  }
  const bool left =
      std::any_of(said.begin(), said.end(), [](const auto& one) { return one.first == kLeft; });
  if (left) look();
  for (auto& [p, peer] : peers_) {
    for (const auto& [kind, payload] : said) {
      if (peer.open && kind != kLeft) peer.wire.put(kind, payload);
    }
    if (written[p] > 0) {
      std::string bytes(written[p], '\0');
      read_some(board_.ring(own_, p), bytes.data(), bytes.size());
      if (peer.open) peer.wire.put(kRing, bytes);
      board_.member(own_).changed.notify();
    }
    if (left && peer.open) peer.wire.put(kLeft, "");
    deliver(p, peer);
  }
  if (!left) return;
  const Clock::time_point limit = after(kGoodbye);
  while (!all_written() && Clock::now() < limit) {
    for (auto& [p, peer] : peers_) send(p, peer);
    if (!all_written()) usleep(1000);
  }
  left_said_ = true;
}

void Relay::deliver(int process, Peer& peer) {
  if (!peer.waiting.empty()) {
    const std::size_t count =
        write_some(board_.ring(process, own_), peer.waiting.data(), peer.waiting.size());
    peer.waiting.erase(0, count);
    if (count > 0) board_.member(own_).changed.notify();
  }
  // What it sent before it left can still be read.
  if (peer.left && !peer.left_told && peer.waiting.empty()) {
    peer.left_told = true;
    events_.left(process);
  }
}

void Relay::send(int process, Peer& peer) {
  if (peer.open && peer.wire.write() == Progress::kEnded) receive(process, peer);
}

void Relay::receive(int process, Peer& peer) {
  std::string why = "has ended without closing the fabric: it was killed, or crashed";
  try {
    while (peer.open) {
      const Progress progress = peer.wire.read();
      if (peer.wire.there()) {
        peer.heard = Clock::now();
        handle(process, peer, peer.wire.take());
        continue;
      }
      if (progress == Progress::kNone) return;
      if (progress == Progress::kEnded) break;
    }
  } catch (const Error& error) {
    why = std::string("is not to be believed: it sends ") + error.what();
  }
  end(process, peer, why);
}

void Relay::handle(int process, Peer& peer, const Frame& frame) {
  switch (frame.kind) {
    case kRing:
      peer.waiting += frame.payload;
      deliver(process, peer);
      break;
    case kLeft:
      peer.left = true;
      deliver(process, peer);
      break;
    case kNote:
      events_.noted(frame.payload);
      break;
    case kTold:
      events_.told(frame.payload);
      break;
    case kStep:
      peer.step.say(frame.payload);
      break;
    default:  // a beat
      break;
  }
}

void Relay::end(int process, Peer& peer, const std::string& why) {
  if (!peer.open) return;
  peer.open = false;
  if (!peer.left) events_.ended(process, why);
}

bool Relay::all_written() const {
  return std::all_of(peers_.begin(), peers_.end(),
                     [](const auto& one) { return !one.second.open || one.second.wire.written(); });
}

}  // namespace asyncdiff
