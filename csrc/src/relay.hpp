// Carries between hosts what the board holds, which is the memory of one.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "board.hpp"
#include "frames.hpp"

namespace asyncdiff {

// A thread with a connection to each process of other hosts. What lies in the rings from this
// process to them it sends, what it receives it puts into those from them to this process; and it
// tells when one ends: its connection does, or nothing comes from it for `patience` seconds,
// although it sends something more often than that.
class Relay {
 public:
  // Called by the thread.
  struct Events {
    std::function<void(int process, const std::string& why)> ended;
    std::function<void(int process)> left;
    std::function<void(const std::string& note)> noted;
    std::function<void(const std::string& text)> told;
  };

  Relay(Board board, int own, std::map<int, Wire> connections, double patience, Events events);
  // Says first what is still to be said, for a second at most.
  ~Relay();
  Relay(const Relay&) = delete;
  Relay& operator=(const Relay&) = delete;
  void start();
  // In a forked child, where the thread is not.
  void forget();

  // Whether a process is on another host.
  bool reaches(int process) const { return peers_.count(process) != 0; }
  // Whether such a process has left, and all that it sent before lies in the ring, or has been
  // read: other processes of this host may know it earlier, or later.
  bool left(int process) const { return peers_.at(process).left_told; }
  // What such a process does now.
  const BoardStep& step(int process) const { return peers_.at(process).step; }
  // A ring of such a process was written to, or read from.
  void ring_changed();
  // To all processes of other hosts, before what is written to rings after it: that this process
  // has left (which waits, for a second at most, until it was said), why nothing goes on any more,
  // and what users of the fabric have to tell.
  void say_left();
  void say_note(const std::string& note);
  void tell(const std::string& text);
  // What this process does now.
  void say_step(const std::string& text);

 private:
  struct Peer {
    explicit Peer(Wire connection) : wire(std::move(connection)) {}
    Wire wire;
    bool open = true;
    bool left = false;
    std::atomic<bool> left_told{false};
    std::string waiting;  // that has come, and is not yet in the ring
    BoardStep step{};
    Clock::time_point heard = Clock::now();
  };

  void run();
  void say(char kind, const std::string& payload);
  // What this process wants sent, and what came from others, as far as there is room for it.
  void collect();
  void deliver(int process, Peer& peer);
  void receive(int process, Peer& peer);
  void send(int process, Peer& peer);
  void handle(int process, Peer& peer, const Frame& frame);
  void end(int process, Peer& peer, const std::string& why);
  bool all_written() const;

  Board board_;
  int own_;
  std::map<int, Peer> peers_;
  double patience_;
  Events events_;
  int wake_;          // an event descriptor
  std::mutex mutex_;  // guards outbox_
  std::vector<std::pair<char, std::string>> outbox_;
  std::atomic<bool> left_said_{false};
  std::atomic<bool> stop_{false};
  std::thread* thread_ = nullptr;
};

}  // namespace asyncdiff
