// Threads of the library's own.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <functional>
#include <thread>
#include <utility>

namespace asyncdiff {

// A thread that takes no signals: these are for the caller's threads. The caller owns it; a forked
// child, in which it does not run, forgets it.
inline std::thread* background_thread(std::function<void()> work) {
  // The caller's own are as they were afterwards, also where there can be no further thread.
  struct Blocked {
    Blocked() {
      sigset_t all_signals;
      sigfillset(&all_signals);
      pthread_sigmask(SIG_SETMASK, &all_signals, &before);
    }
    ~Blocked() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
    sigset_t before;
  } blocked;
  return new std::thread(std::move(work));
}

}  // namespace asyncdiff
