// Learns at once when another process of this machine ends.
#pragma once

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "board.hpp"
#include "identity.hpp"

namespace asyncdiff {

// A thread that sleeps until a process ends: on process descriptors (pidfd_open, Linux 5.3). One
// that has none, because it is of another PID namespace or the system offers none, has ended when
// its beats on the board have stopped for `patience` seconds; then, and only then, all threads of
// this kind wake up ten times a second and beat.
class Watcher {
 public:
  // all[p] is process p, `own` is this one; those of other hosts are not watched. gone(p) is called
  // by the thread, once for each.
  Watcher(Board board, std::vector<Identity> all, int own, double patience,
          std::function<void(int)> gone);
  ~Watcher();
  Watcher(const Watcher&) = delete;
  Watcher& operator=(const Watcher&) = delete;
  void start();
  // All processes have made theirs.
  void all_there() { all_there_ = true; }
  // Whether a process is stopped, by a signal or a debugger; false where nobody can tell.
  bool is_stopped(int process) const;
  // Whether a process is known to have ended, maybe before the thread has noticed.
  bool has_ended(int process) const;
  // In a forked child, where the thread is not.
  void forget();

 private:
  void run();

  Board board_;
  std::vector<Identity> all_;
  int own_;
  double patience_;
  std::function<void(int)> gone_;
  std::vector<int> descriptors_;  // by process; -1 where there is none
  std::vector<bool> watched_;
  int stop_;  // an event descriptor
  std::atomic<bool> all_there_{false};
  std::thread* thread_ = nullptr;
};

}  // namespace asyncdiff
