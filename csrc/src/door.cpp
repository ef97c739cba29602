#include "door.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "handshake.hpp"

namespace asyncdiff {

namespace {

// Seconds that a connection has to say who it is.
constexpr double kPatience = 5;
// Connections that have not said it yet.
constexpr std::size_t kMostStrangers = 128;

constexpr char kListens = '0', kKnocks = '1';  // roles on the wire

void tell(const Socket& socket, const std::string& bytes) {
  std::size_t done = 0;
  write_some(socket, bytes, done);
}

// Reads so many bytes, or fewer where the other side ends or the time is over.
std::string read_whole(const Socket& socket, std::size_t size, Clock::time_point limit) {
  std::string out;
  while (out.size() < size) {
    const Progress progress = read_some(socket, out, size);
    if (progress == Progress::kEnded || Clock::now() >= limit) break;
    if (progress == Progress::kSome) continue;
    std::vector<Interest> all = {{&socket, false}};
    wait_for(all, limit);
  }
  return out;
}

// One that joined and is gone may come again: it was restarted.
bool ended(Wire& wire) { return wire.read() == Progress::kEnded; }

}  // namespace

Clock::time_point after(double seconds) {
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof text, "%g s", seconds);
  return text;
}

Door::Door(Socket listener, std::set<int> expected, int processes, std::string key)
    : listener_(std::move(listener)),
      expected_(std::move(expected)),
      processes_(processes),
      key_(std::move(key)) {}

int Door::missing() const {
  for (int p : expected_) {
    if (in_.count(p) == 0) return p;
  }
  return -1;
}

bool Door::wait(Clock::time_point limit) {
  while (in_.size() < expected_.size()) {
    std::vector<Interest> all = {{&listener_, false}};
    Clock::time_point next = limit;
    for (const Guest& guest : guests_) {
      all.push_back({&guest.socket, false});
      next = std::min(next, guest.limit);
    }
    wait_for(all, next);
    if (Clock::now() >= limit) return false;
    std::size_t i = 1;
    for (auto guest = guests_.begin(); guest != guests_.end(); ++i) {
      const bool stays = all[i].ready ? listen_to(*guest) : Clock::now() < guest->limit;
      if (!stays && !all[i].ready) strangers_ = "one said nothing for too long";
      guest = stays ? std::next(guest) : guests_.erase(guest);
    }
    if (all[0].ready) let_in();
  }
  return true;
}

void Door::let_in() {
  Guest guest;
  guest.socket = accept_from(listener_);
  if (!guest.socket.open()) return;
  guest.hello = handshake::hello();
  guest.limit = after(kPatience);
  std::size_t done = 0;
  write_some(guest.socket, guest.hello, done);  // a new connection has room for it
  if (done < guest.hello.size()) return;
  if (guests_.size() == kMostStrangers) guests_.pop_front();
  guests_.push_back(std::move(guest));
}

// Whether it is still one that has not said who it is.
bool Door::listen_to(Guest& guest) {
  const Progress progress = read_some(guest.socket, guest.said, handshake::kJoinBytes);
  if (progress == Progress::kEnded) {
    strangers_ = "one ended before it said who it is";
    return false;
  }
  if (guest.said.size() < handshake::kJoinBytes) return true;
  const auto joining = handshake::read_join(key_, guest.hello, guest.said);
  if (!joining.proven) {
    strangers_ = "one does not know the key";
    tell(guest.socket, handshake::other_key());
    return false;
  }
  const auto number = static_cast<int>(joining.process);
  std::string refusal;
  if (static_cast<int>(joining.processes) != processes_) {
    refusal = "process " + std::to_string(number) + " is one of " +
              std::to_string(joining.processes) + ", process 0 one of " +
              std::to_string(processes_);
  } else if (expected_.count(number) == 0) {
    refusal = "there is no process " + std::to_string(number) + ": they are numbered 0 to " +
              std::to_string(processes_ - 1);
  } else if (in_.count(number) != 0 && !ended(in_.at(number))) {
    refusal = "two processes say that they are process " + std::to_string(number);
  }
  tell(guest.socket, handshake::answer(key_, guest.hello, guest.said, refusal));
  if (!refusal.empty()) throw InvalidArgument(refusal);
  in_.erase(number);
  in_.emplace(number,
              Wire(std::move(guest.socket), handshake::session_key(key_, guest.hello, guest.said),
                   kListens, kKnocks));
  return false;
}

bool knock(const SocketAddress& address, int process, int processes, const std::string& key,
           int whom, Clock::time_point limit, std::map<int, Wire>& in, std::string& why) {
  // Not for ever: who answers nothing may not be the one.
  const Clock::time_point once = std::min(limit, after(kPatience));
  Socket socket = connect_to(address, once, why);
  if (!socket.open()) return false;
  const std::string hello = read_whole(socket, handshake::kHelloBytes, once);
  const std::string name = "process " + std::to_string(whom);
  if (!handshake::is_hello(hello)) {
    why = hello.empty() ? "it does not answer" : "what listens there is no " + name;
    return false;
  }
  const std::string join = handshake::join(key, hello, static_cast<std::uint32_t>(process),
                                           static_cast<std::uint32_t>(processes));
  tell(socket, join);
  const std::string bytes = read_whole(socket, handshake::kAnswerBytes, once);
  if (bytes.size() < handshake::kAnswerBytes) {
    why = "it does not answer, or has met all its processes";
    return false;
  }
  const auto answer = handshake::read_answer(key, hello, join, bytes);
  if (!answer.proven) {
    throw AuthenticationError(name + ", at " + text_of(address) +
                              ", has another key: all processes need the same");
  }
  if (!answer.refusal.empty()) throw InvalidArgument(answer.refusal);
  in.emplace(whom,
             Wire(std::move(socket), handshake::session_key(key, hello, join), kKnocks, kListens));
  return true;
}

}  // namespace asyncdiff
