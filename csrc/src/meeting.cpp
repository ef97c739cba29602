#include "meeting.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <list>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/interrupt.hpp"
#include "handshake.hpp"

namespace asyncdiff {

namespace {

// Seconds that a connection has to say who it is.
constexpr double kPatience = 5;
// Connections that have not said it yet.
constexpr std::size_t kMostStrangers = 128;

constexpr char kFirst = '0', kOther = '1';  // roles on the wire

// Takes the path of a Unix socket away again.
class Path {
 public:
  explicit Path(const std::string& path) : path_(path) {}
  ~Path() {
    if (!path_.empty()) unlink(path_.c_str());
  }
  Path(const Path&) = delete;
  Path& operator=(const Path&) = delete;

 private:
  std::string path_;
};

struct Guest {
  Socket socket;
  std::string hello;
  std::string said;
  Clock::time_point limit;
};

class Door {
 public:
  Door(const SocketAddress& address, int processes, const std::string& key)
      : processes_(processes),
        key_(key),
        listener_(listen_at(address, processes + 64)),
        path_(address.path) {}

  std::map<int, Wire> wait(double timeout) {
    const Clock::time_point limit = after(timeout);
    while (static_cast<int>(in_.size()) < processes_ - 1) {
      std::vector<Interest> all = {{&listener_, false}};
      Clock::time_point next = limit;
      for (const Guest& guest : guests_) {
        all.push_back({&guest.socket, false});
        next = std::min(next, guest.limit);
      }
      wait_for(all, next);
      if (Clock::now() >= limit) late(timeout);
      std::size_t i = 1;
      for (auto guest = guests_.begin(); guest != guests_.end(); ++i) {
        const bool stays = all[i].ready ? listen_to(*guest) : Clock::now() < guest->limit;
        if (!stays && !all[i].ready) strangers_ = "one said nothing for too long";
        guest = stays ? std::next(guest) : guests_.erase(guest);
      }
      if (all[0].ready) let_in();
    }
    return std::move(in_);
  }

 private:
  void let_in() {
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
  bool listen_to(Guest& guest) {
    const Progress progress = read_some(guest.socket, guest.said, handshake::kJoinBytes);
    if (progress == Progress::kEnded) {
      strangers_ = "one ended before it said who it is";
      return false;
    }
    if (guest.said.size() < handshake::kJoinBytes) return true;
    const auto joining = handshake::read_join(key_, guest.hello, guest.said);
    if (!joining.proven) {
      strangers_ = "one does not know the key";
      tell(guest, handshake::other_key());
      return false;
    }
    const auto number = static_cast<int>(joining.process);
    std::string refusal;
    if (static_cast<int>(joining.processes) != processes_) {
      refusal = "process " + std::to_string(number) + " is one of " +
                std::to_string(joining.processes) + ", process 0 one of " +
                std::to_string(processes_);
    } else if (number < 1 || number >= processes_) {
      refusal = "there is no process " + std::to_string(number) + ": they are numbered 0 to " +
                std::to_string(processes_ - 1);
    } else if (in_.count(number) != 0 && !ended(in_.at(number))) {
      refusal = "two processes say that they are process " + std::to_string(number);
    }
    tell(guest, handshake::answer(key_, guest.hello, guest.said, refusal));
    if (!refusal.empty()) throw InvalidArgument(refusal);
    in_.erase(number);
    in_.emplace(number,
                Wire(std::move(guest.socket), handshake::session_key(key_, guest.hello, guest.said),
                     kFirst, kOther));
    return false;
  }

  static void tell(const Guest& guest, const std::string& bytes) {
    std::size_t done = 0;
    write_some(guest.socket, bytes, done);
  }

  // One that joined and is gone may come again: it was restarted.
  static bool ended(Wire& wire) { return wire.read() == Progress::kEnded; }

  [[noreturn]] void late(double timeout) {
    std::string there = "0";
    int missing = -1;
    for (int p = 1; p < processes_; ++p) {
      if (in_.count(p) != 0) {
        there += ", " + std::to_string(p);
      } else if (missing < 0) {
        missing = p;
      }
    }
    const std::string text =
        "only processes [" + there + "] of " + std::to_string(processes_) + " came within " +
        seconds_text(timeout) +
        (strangers_.empty() ? "" : " (of the connections that came, " + strangers_ + ")");
    for (auto& [p, wire] : in_) wire.tell_end(kLate, missing, text);
    throw CollectiveTimeout(missing, {}, text);
  }

  int processes_;
  const std::string& key_;
  Socket listener_;
  Path path_;
  std::list<Guest> guests_;
  std::map<int, Wire> in_;
  std::string strangers_;  // what was the matter with the last of them
};

// Reads so many bytes, or fewer where the other side ends or the time is over.
std::string read_whole(const Socket& socket, std::size_t size, Clock::time_point limit) {
  std::string out;
  while (out.size() < size) {
    const Progress progress = read_some(socket, out, size);
    if (progress == Progress::kEnded) break;
    if (progress == Progress::kSome) continue;
    if (Clock::now() >= limit) break;
    std::vector<Interest> all = {{&socket, false}};
    wait_for(all, limit);
  }
  return out;
}

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

std::map<int, Wire> wait_for_others(const SocketAddress& address, int processes,
                                    const std::string& key, double timeout) {
  if (processes == 1) return {};
  return Door(address, processes, key).wait(timeout);
}

std::map<int, Wire> join_first(const SocketAddress& address, int process, int processes,
                               const std::string& key, double timeout) {
  const Clock::time_point limit = after(timeout);
  std::string why = "it does not listen";
  for (bool first = true; first || Clock::now() < limit; first = false) {
    if (!first) {
      usleep(20000);
      check_interrupt();
    }
    // Not for ever: who answers nothing may not be process 0.
    const Clock::time_point once = std::min(limit, after(kPatience));
    Socket socket = connect_to(address, once, why);
    if (!socket.open()) continue;
    const std::string hello = read_whole(socket, handshake::kHelloBytes, once);
    if (!handshake::is_hello(hello)) {
      why = hello.empty() ? "it does not answer" : "what listens there is no process 0";
      continue;
    }
    const std::string join = handshake::join(key, hello, static_cast<std::uint32_t>(process),
                                             static_cast<std::uint32_t>(processes));
    std::size_t done = 0;
    write_some(socket, join, done);
    const std::string bytes = read_whole(socket, handshake::kAnswerBytes, once);
    if (bytes.size() < handshake::kAnswerBytes) {
      why = "it does not answer, or has met all its processes";
      continue;
    }
    const auto answer = handshake::read_answer(key, hello, join, bytes);
    if (!answer.proven) {
      throw AuthenticationError("process 0, at " + text_of(address) +
                                ", has another key: all processes need the same");
    }
    if (!answer.refusal.empty()) throw InvalidArgument(answer.refusal);
    std::map<int, Wire> out;
    out.emplace(0,
                Wire(std::move(socket), handshake::session_key(key, hello, join), kOther, kFirst));
    return out;
  }
  throw CollectiveTimeout(0, {},
                          "process 0 was not met at " + text_of(address) + " within " +
                              seconds_text(timeout) + ": " + why);
}

}  // namespace asyncdiff
