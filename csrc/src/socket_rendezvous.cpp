#include "asyncdiff/socket_rendezvous.hpp"

#include <cmath>
#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/env.hpp"
#include "asyncdiff/errors.hpp"
#include "meeting.hpp"

namespace asyncdiff {

namespace {

// Longer than process 0 waits for others: it says then for whom.
constexpr double kGrace = 1;

}  // namespace

class SocketRendezvous::Implementation {
 public:
  Implementation(const SocketAddress& address, int process, int processes, const std::string& key,
                 double timeout)
      : process_(process),
        processes_(processes),
        timeout_(timeout),
        peers_(process == 0 ? wait_for_others(address, processes, key, timeout)
                            : join_first(address, process, processes, key, timeout)) {}

  int process() const { return process_; }
  int processes() const { return processes_; }

  std::vector<std::string> all_gather(const std::string& mine) {
    if (!over_.empty()) throw_over();
    if (closed_) throw Error("the rendezvous is closed");
    const Clock::time_point limit = after(timeout_ + (process_ == 0 ? 0 : kGrace));
    if (process_ != 0) {
      peers_.at(0).put(kSaid, mine);
      flush(limit);
      const std::string said = receive(limit).at(0);
      std::vector<std::string> all = unpacked(said);
      if (all.size() != static_cast<std::size_t>(processes_)) {
        throw Error("process 0 sends what nobody can read");
      }
      return all;
    }
    std::map<int, std::string> heard = receive(limit);
    heard[0] = mine;
    std::vector<std::string> all;
    for (auto& [p, text] : heard) all.push_back(std::move(text));
    const std::string everything = packed(all);
    for (auto& [p, peer] : peers_) peer.put(kSaid, everything);
    flush(limit);
    return all;
  }

  void close() {
    closed_ = true;
    peers_.clear();
  }

 private:
  static constexpr int kNobody = -1;

  void flush(Clock::time_point limit) {
    while (true) {
      std::vector<Interest> all;
      for (auto& [p, peer] : peers_) {
        if (peer.write() == Progress::kEnded) ended(p, peer);
        if (!peer.written()) all.push_back({&peer.socket(), true});
      }
      if (all.empty()) return;
      if (Clock::now() >= limit) {
        for (auto& [p, peer] : peers_) {
          if (!peer.written()) end(kLate, p);
        }
      }
      wait_for(all, limit);
    }
  }

  // What each of the others says, by process.
  std::map<int, std::string> receive(Clock::time_point limit) {
    std::map<int, std::string> out;
    while (true) {
      std::vector<Interest> all;
      int missing = kNobody;
      for (auto& [p, peer] : peers_) {
        if (out.count(p) != 0) continue;
        const Progress progress = read(p, peer);
        if (peer.there()) {
          const Frame frame = peer.take();
          if (frame.kind != kSaid) told(frame);
          out[p] = frame.payload;
          continue;
        }
        if (progress == Progress::kEnded) end(kLost, p);
        if (missing == kNobody) missing = p;
        all.push_back({&peer.socket(), false});
      }
      if (all.empty()) return out;
      if (Clock::now() >= limit) end(kLate, missing);
      wait_for(all, limit);
    }
  }

  // It may have said why before it ended.
  [[noreturn]] void ended(int process, Wire& peer) {
    while (read(process, peer) == Progress::kSome && peer.there()) {
      const Frame frame = peer.take();
      if (frame.kind != kSaid) told(frame);
    }
    end(kLost, process);
  }

  Progress read(int process, Wire& peer) {
    try {
      return peer.read();
    } catch (const Error& error) {
      end(kLost, process, error.what());
    }
  }

  // Nothing goes on, because of this process; process 0 tells the others.
  [[noreturn]] void end(char kind, int process, const std::string& why = "") {
    over_ = std::string(1, kind) + std::to_string(process);
    reason_ = "process " + std::to_string(process) +
              (!why.empty()    ? " is not to be believed: it sends " + why
               : kind == kLate ? " said nothing for " + seconds_text(timeout_)
                               : " has ended, or has closed its rendezvous");
    for (auto& [p, peer] : peers_) {
      if (process_ != 0) continue;
      peer.tell_end(kind, process, reason_);
    }
    throw_over();
  }

  [[noreturn]] void told(const Frame& frame) {
    const std::vector<std::string> parts = unpacked(frame.payload);
    over_ = std::string(1, frame.kind) + (parts.empty() ? "-1" : parts[0]);
    reason_ = parts.size() < 2 ? "process 0 gave up" : parts[1];
    throw_over();
  }

  [[noreturn]] void throw_over() const {
    const int process = std::stoi(over_.substr(1));
    if (over_[0] == kLate) throw CollectiveTimeout(process, {}, reason_);
    throw ProcessLost(process, {}, reason_);
  }

  int process_;
  int processes_;
  double timeout_;
  std::map<int, Wire> peers_;
  bool closed_ = false;
  std::string over_;  // kind and process, once nothing goes on
  std::string reason_;
};

SocketRendezvous::SocketRendezvous(const SocketAddress& address, int process, int processes,
                                   std::string key, double timeout) {
  if (processes < 1 || process < 0 || process >= processes) {
    throw InvalidArgument("process " + std::to_string(process) + " of " +
                          std::to_string(processes) + ": they are numbered from 0");
  }
  if (!std::isfinite(timeout) || timeout <= 0 || timeout > 86400) {
    throw InvalidArgument("a rendezvous waits for a positive number of seconds, at most a day");
  }
  if (key.empty()) {
    throw InvalidArgument("a rendezvous over sockets needs a key that strangers cannot guess");
  }
  implementation_ = std::make_unique<Implementation>(address, process, processes, key, timeout);
}

SocketRendezvous::~SocketRendezvous() = default;

std::shared_ptr<SocketRendezvous> SocketRendezvous::from_environment(double timeout) {
  const env::World world = env::world();
  return std::make_shared<SocketRendezvous>(SocketAddress{world.address, world.port, ""},
                                            world.process, world.processes, world.key, timeout);
}

int SocketRendezvous::process() const { return implementation_->process(); }
int SocketRendezvous::processes() const { return implementation_->processes(); }

std::vector<std::string> SocketRendezvous::all_gather(const std::string& mine) {
  return implementation_->all_gather(mine);
}

void SocketRendezvous::close() { implementation_->close(); }

}  // namespace asyncdiff
