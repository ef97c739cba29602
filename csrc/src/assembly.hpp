// The processes of a fabric: how they come together, call together, and learn that one is gone.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "asyncdiff/memory.hpp"
#include "asyncdiff/rendezvous.hpp"
#include "board.hpp"
#include "identity.hpp"
#include "relay.hpp"
#include "watcher.hpp"

namespace asyncdiff {

// The rendezvous is used while this is made, and never again: from then on the processes talk
// through shared memory and, between hosts, through connections of their own; a process that ends
// is noticed at once. Any number of them can then make a call together, and the others need not
// know.
class Assembly {
 public:
  // Rank r runs in process owners[r]. Collective. No call waits longer than `deadline` seconds for
  // a process that lives, where the caller says nothing else. Throws InvalidArgument where
  // processes are of different versions.
  Assembly(Rendezvous& rendezvous, std::vector<int> owners, double deadline);
  ~Assembly();
  Assembly(const Assembly&) = delete;
  Assembly& operator=(const Assembly&) = delete;

  int process() const { return process_; }
  int count() const { return count_; }
  double deadline() const { return deadline_; }
  // The number of a process's host.
  int host(int process) const { return hosts_[static_cast<std::size_t>(process)]; }

  // Sends `mine` to all members, this process among them, and returns what each sent, by process
  // (empty for the others). Any two processes make the calls that they share in the same order. Who
  // lives is waited for for so many seconds, which begin anew with each of its heartbeats.
  // Throws ProcessLost, CollectiveTimeout, and InvalidArgument where a process is in a call of
  // other members; after any of these no call can be made any more. `what` is for messages.
  std::vector<std::string> exchange(const std::vector<int>& members, const std::string& mine,
                                    const std::string& what, double seconds);

  // Tells all processes that this one goes on, and with what.
  void heartbeat(const std::string& doing);
  // What another one said last.
  const BoardStep& step(int process) const;

  // Called, by any thread, when a process is gone or a call has failed. Empty: by nobody. It is not
  // called any more once this returns.
  void on_end(std::function<void()> wake);
  // Whether nothing goes on any more.
  bool over() const { return board_.note().state.load(std::memory_order_acquire) != 0; }
  // Throws why nothing goes on any more, if that is so.
  void check() const;
  // Tells something to all processes of other hosts, who get it before any call that this process
  // makes with them later.
  void tell(const std::string& text);
  // heard(text) is called, by one thread, for what others tell. Empty: by nobody. It is not called
  // any more once this returns.
  void on_told(std::function<void(const std::string&)> heard);
  // Ends everything because of that process, unless it has left: `why` says what it did.
  void lost(int process, const std::string& why);
  // This process needs no fabric any more.
  void leave();
  bool left(int process) const;
  // Ends everything because of a process among these that has ended, and throws that, if one has.
  void check_ended(const std::vector<int>& members);
  // Ends everything because that process has left.
  void lost_because_left(int process);
  // Throws in a child that was forked from the process that this belongs to.
  void check_own() const;
  bool own() const { return forks() == forks_; }
  // "process 1 (rank 3)"
  std::string name_of(int process) const;

 private:
  class Call;

  std::vector<int> ranks_of(int process) const;
  void end(BoardNote::Kind kind, int process, const std::string& text);
  bool note(BoardNote::Kind kind, int process, const std::string& text);
  void say_note();
  void wake();
  void process_ended(int process);
  void ring_changed(int process);
  std::unique_ptr<Relay> relay_to(std::map<int, Wire> connections);

  std::vector<int> owners_;
  std::vector<int> hosts_;  // by process
  int process_;
  int count_;
  double deadline_;
  unsigned forks_;
  Buffer memory_;
  Board board_;
  std::mutex calls_;  // one call at a time
  std::mutex wake_mutex_;
  std::function<void()> wake_;
  std::function<void(const std::string&)> heard_;
  std::unique_ptr<Relay> relay_;
  std::unique_ptr<Watcher> watcher_;  // whose thread uses the relay
};

}  // namespace asyncdiff
