#include "socket_pump.hpp"

#include <linux/sockios.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string>
#include <utility>

#include "asyncdiff/errors.hpp"
#include "background_thread.hpp"
#include "door.hpp"

namespace asyncdiff {

namespace {

// Seconds after the end of a connection within which its process says why, if it lives.
constexpr double kGrace = 1;
// Bytes that one process's connection moves before it is another one's turn.
constexpr std::size_t kTurn = std::size_t{4} << 20;

void signal_event(int descriptor) {
  const std::uint64_t one = 1;
  while (write(descriptor, &one, sizeof one) < 0 && errno == EINTR) {
  }
}

}  // namespace

SocketPump::SocketPump(std::shared_ptr<HostFabric::Shared> shared, std::map<int, Wire> connections)
    : shared_(std::move(shared)), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (wake_ < 0) throw Error(std::string("making an event descriptor: ") + std::strerror(errno));
  for (auto& [p, wire] : connections) peers_.emplace(p, std::move(wire));
  thread_ = background_thread([this] { run(); });
}

SocketPump::~SocketPump() {
  close();
  ::close(wake_);
}

std::uint32_t SocketPump::add(std::shared_ptr<SocketEnd> end) {
  const std::lock_guard lock(mutex_);
  ends_.emplace(next_end_, std::move(end));
  return next_end_++;
}

void SocketPump::remove(std::uint32_t number) {
  if (shared_->processes.forked()) return;  // whoever held the lock is not here
  const std::lock_guard lock(mutex_);
  ends_.erase(number);
}

void SocketPump::committed(const std::shared_ptr<SocketEnd>& end, std::uint64_t count) {
  put(end, kBundle, count);
}

void SocketPump::released(const std::shared_ptr<SocketEnd>& end, std::uint64_t count) {
  put(end, kRelease, count);
}

void SocketPump::put(const std::shared_ptr<SocketEnd>& end, Kind kind, std::uint64_t count) {
  {
    const std::lock_guard lock(mutex_);
    const bool bundle = kind == kBundle;
    const Head head{kind, end->theirs, generation_, count, bundle ? end->slot_nbytes : 0};
    const std::byte* data =
        bundle ? end->slots + (count - 1) % end->ring * end->slot_nbytes : nullptr;
    peers_.at(end->peer).out.push_back({head, end, data});
  }
  signal_event(wake_);
}

void SocketPump::reset() {
  const Clock::time_point limit = after(shared_->deadline);
  while (true) {
    bool sending = false;
    {
      const std::lock_guard lock(mutex_);
      for (auto& [p, peer] : peers_) {
        // What has begun has to end, for the other side to find what follows.
        const bool begun = peer.sending || (!peer.out.empty() && peer.out.front().done > 0);
        peer.out.resize(std::min<std::size_t>(peer.out.size(), begun ? 1 : 0));
        sending = sending || (begun && peer.open);
      }
      if (!sending) {
        ++generation_;
        return;
      }
    }
    shared_->processes.check();
    if (Clock::now() >= limit) throw Error("a bundle is still being sent after the deadline");
    usleep(100);
  }
}

bool SocketPump::flushed() {
  const std::lock_guard lock(mutex_);
  return std::all_of(peers_.begin(), peers_.end(), [](auto& one) {
    Peer& peer = one.second;
    if (!peer.open) return true;
    if (!peer.out.empty()) return false;
    int unacknowledged = 0;
    ioctl(peer.wire.socket().descriptor(), SIOCOUTQ, &unacknowledged);
    return unacknowledged == 0;
  });
}

void SocketPump::close() {
  if (thread_ == nullptr) return;
  if (shared_->processes.forked()) {  // the thread is not here
    thread_ = nullptr;
    return;
  }
  const Clock::time_point limit = after(shared_->deadline);
  while (!flushed() && !shared_->processes.over() && Clock::now() < limit) usleep(200);
  stop_ = true;
  signal_event(wake_);
  thread_->join();
  delete thread_;
  thread_ = nullptr;
  // A child that was forked may have these sockets open, too.
  for (auto& [p, peer] : peers_) shutdown(peer.wire.socket().descriptor(), SHUT_WR);
}

bool SocketPump::wants_to_send(Peer& peer) {
  const std::lock_guard lock(mutex_);
  return !peer.out.empty();
}

void SocketPump::run() {
  while (!stop_) {
    std::vector<pollfd> polled = {{wake_, POLLIN, 0}};
    std::vector<int> whose = {-1};
    bool ended = false;
    for (auto& [p, peer] : peers_) {
      ended = ended || peer.ended;
      if (!peer.open) continue;
      const int events = wants_to_send(peer) ? POLLIN | POLLOUT : POLLIN;
      polled.push_back({peer.wire.socket().descriptor(), static_cast<short>(events), 0});
      whose.push_back(p);
    }
    poll(polled.data(), polled.size(), ended ? 100 : -1);
    std::uint64_t events = 0;
    while (read(wake_, &events, sizeof events) < 0 && errno == EINTR) {
    }
    for (std::size_t i = 1; i < polled.size(); ++i) {
      Peer& peer = peers_.at(whose[i]);
      if ((polled[i].revents & ~POLLOUT) != 0) receive(whose[i], peer);
    }
    for (auto& [p, peer] : peers_) send(peer);
    look_for_lost();
  }
}

// Its process is the one that tells why, if it does; else it is lost.
void SocketPump::look_for_lost() {
  for (auto& [p, peer] : peers_) {
    if (!peer.ended || Clock::now() - *peer.ended < std::chrono::duration<double>(kGrace)) continue;
    peer.ended.reset();
    shared_->processes.lost(p, "has ended its connection for bundles, or it broke");
  }
}

void SocketPump::stop(Peer& peer) {
  {
    const std::lock_guard lock(mutex_);
    if (!peer.open) return;
    peer.open = false;
    peer.ended = Clock::now();
    peer.out.clear();
    peer.sending = false;
  }
  shared_->control->changed.notify();
}

void SocketPump::send(Peer& peer) {
  for (std::size_t turn = 0; peer.open && turn < kTurn;) {
    Message* message = nullptr;
    {
      const std::lock_guard lock(mutex_);
      peer.sending = !peer.out.empty();
      if (!peer.sending) return;
      message = &peer.out.front();  // stays where it is while others are added, or taken away
    }
    const std::size_t head_left = sizeof(Head) - std::min(message->done, sizeof(Head));
    const std::size_t data_done = message->done - (sizeof(Head) - head_left);
    iovec parts[2] = {
        {reinterpret_cast<char*>(&message->head) + (sizeof(Head) - head_left), head_left},
        {const_cast<std::byte*>(message->data) + data_done,
         static_cast<std::size_t>(message->head.nbytes) - data_done}};
    msghdr header{};
    header.msg_iov = parts;
    header.msg_iovlen = 2;
    const ssize_t count = sendmsg(peer.wire.socket().descriptor(), &header, MSG_NOSIGNAL);
    if (count < 0 && errno != EAGAIN && errno != EINTR) return stop(peer);
    const std::lock_guard lock(mutex_);
    if (count > 0) {
      message->done += static_cast<std::size_t>(count);
      turn += static_cast<std::size_t>(count);
    }
    peer.sending = false;
    if (message->done == sizeof(Head) + message->head.nbytes) {
      peer.out.pop_front();
    } else if (count < 0) {
      return;
    }
  }
}

void SocketPump::receive(int process, Peer& peer) {
  for (std::size_t turn = 0; turn < kTurn;) {
    const bool in_head = peer.head_done < sizeof(Head);
    char nowhere[1 << 16];
    char* to = nowhere;
    std::size_t most;
    if (in_head) {
      to = reinterpret_cast<char*>(&peer.head) + peer.head_done;
      most = sizeof(Head) - peer.head_done;
    } else {
      most = static_cast<std::size_t>(peer.head.nbytes) - peer.data_done;
      if (peer.end) {
        to = reinterpret_cast<char*>(peer.data) + peer.data_done;
      } else {
        most = std::min(most, sizeof nowhere);
      }
    }
    const ssize_t count = recv(peer.wire.socket().descriptor(), to, most, 0);
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (count <= 0) return stop(peer);
    turn += static_cast<std::size_t>(count);
    if (in_head) {
      peer.head_done += static_cast<std::size_t>(count);
      if (peer.head_done < sizeof(Head)) continue;
      try {
        take_head(process, peer);
      } catch (const Error& error) {
        stop(peer);
        peer.ended.reset();
        shared_->processes.lost(process, error.what());
        return;
      }
    } else {
      peer.data_done += static_cast<std::size_t>(count);
    }
    if (peer.data_done == peer.head.nbytes) arrived(peer);
  }
}

void SocketPump::take_head(int process, Peer& peer) {
  const std::lock_guard lock(mutex_);
  const Head& head = peer.head;
  peer.end = nullptr;
  peer.data_done = 0;
  if (head.kind != kBundle && head.kind != kRelease) {
    throw Error("is not to be believed: it sends what nobody can read");
  }
  const auto found = ends_.find(head.end);
  // Of a channel that is closed, or of before a reset.
  if (found == ends_.end() || head.generation != generation_) return;
  const SocketEnd& end = *found->second;
  const bool bundle = head.kind == kBundle;
  bool right =
      end.peer == process && end.sends != bundle && head.nbytes == (bundle ? end.slot_nbytes : 0);
  if (right && bundle) {
    // In turn, into a slot that was released.
    const std::uint64_t before = end.sent->committed.load(std::memory_order_relaxed);
    const std::uint64_t released = end.received->released.load(std::memory_order_relaxed);
    right = head.count == before + 1 && before - released < end.ring;
  }
  if (!right) throw Error("is not to be believed: it sends a bundle that has no place here");
  peer.end = found->second;
  peer.data = bundle ? end.slots + (head.count - 1) % end.ring * end.slot_nbytes : nullptr;
}

void SocketPump::arrived(Peer& peer) {
  peer.head_done = 0;
  const std::shared_ptr<SocketEnd> end = std::move(peer.end);
  peer.end = nullptr;
  if (!end) return;
  {
    const std::lock_guard lock(mutex_);
    if (peer.head.generation != generation_) return;
    auto& count = end->sends ? end->received->released : end->sent->committed;
    count.store(peer.head.count, std::memory_order_release);
  }
  shared_->control->changed.notify();
}

}  // namespace asyncdiff
