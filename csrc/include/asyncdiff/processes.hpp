// Which process runs which rank, and what they do together.
#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/export.hpp"
#include "asyncdiff/rendezvous.hpp"

namespace asyncdiff {

class Assembly;

// Processes that make a call together: all of a fabric, or those that run the ends of a channel.
// Each call is collective among them, and throws ProcessLost where one is gone, CollectiveTimeout
// where one does not come; then the fabric is over in all processes. agree() waits for the fabric's
// deadline, what follows it, with work in it that may take seconds, a minute at least.
class ASYNCDIFF_EXPORT Party {
 public:
  // In order.
  const std::vector<int>& members() const { return members_; }
  bool several() const { return assembly_ != nullptr; }
  // This one, which need not be a member.
  int process() const { return process_; }
  bool here() const;

  // What each sends, by process; empty for who is no member.
  std::vector<std::string> all_gather(const std::string& mine) const;
  void barrier() const { all_gather(""); }

  // Does work that may throw. Where it throws in one process, it throws in all: nobody goes on
  // alone, or waits for one that gave up.
  void together(const std::string& what, const std::function<void()>& work) const;

  // The values of a call that all members make, by what they are, as this process makes it.
  using Values = std::vector<std::pair<std::string, std::string>>;
  // Makes sure that all members make the same call, `what`, with the same values; describe() may
  // throw, as the work of together(). Throws InvalidArgument, naming the first value that differs
  // and the process in which it does.
  void agree(const std::string& what, const std::function<Values()>& describe) const;

 private:
  friend class Processes;
  std::vector<std::string> all_gather(const std::string& mine, const std::string& what,
                                      double seconds) const;
  // For steps of a call that all have come to.
  double work_seconds() const;
  Party(std::shared_ptr<Assembly> assembly, std::vector<int> members, int process)
      : assembly_(std::move(assembly)), members_(std::move(members)), process_(process) {}

  // What went wrong in work(), where something did: the text for others, and what this process
  // throws.
  struct Failure {
    std::string text;
    std::exception_ptr error;
  };
  // Throws ProcessLost, in all, where work failed and a member has ended: because of that.
  Failure failure_of(const std::function<void()>& work) const;
  void throw_any(const std::string& what, const Failure& mine,
                 const std::vector<std::string>& all) const;

  std::shared_ptr<Assembly> assembly_;  // null: this process runs all ranks
  std::vector<int> members_;
  int process_;
};

class ASYNCDIFF_EXPORT Processes {
 public:
  // One process that runs all ranks.
  explicit Processes(int ranks);
  // Rank r runs in process owners[r]. Collective; the rendezvous is used here and not again. Throws
  // InvalidArgument for a process that does not exist.
  Processes(std::vector<int> owners, std::shared_ptr<Rendezvous> rendezvous, double deadline);

  bool several() const { return assembly_ != nullptr; }
  int process() const { return process_; }
  int count() const { return count_; }
  const std::vector<int>& owners() const { return owners_; }
  int owner(int rank) const { return owners_[static_cast<std::size_t>(rank)]; }
  bool mine(int rank) const { return owner(rank) == process(); }
  // Throws InvalidArgument where a rank belongs to another process, Error in a forked child.
  void check_mine(int rank) const;

  // Processes on one host share memory; those of several have connections of their own.

  // How many hosts there are, and the number of that of a process, and of a rank's.
  int hosts() const { return hosts_; }
  int host_of(int process) const;
  int host(int rank) const { return host_of(owner(rank)); }
  // Whether a rank is on this process's host.
  bool here(int rank) const { return host(rank) == host_of(process_); }
  // Whether this process is the first of its host.
  bool first_here() const { return neighbours_.members().front() == process_; }

  const Party& everybody() const { return everybody_; }
  // Those on this host.
  const Party& neighbours() const { return neighbours_; }
  // Those that run these ranks.
  Party party_of(const std::vector<int>& ranks) const;
  // Everybody's bytes, by process; collective. Waits at most so many seconds for a process that
  // lives. Throws InvalidArgument where another call is made elsewhere.
  std::vector<std::string> all_gather(const std::string& mine, double seconds) const;

  // Tells something to all processes of other hosts, which get it, in on_told()'s heard(), before
  // any call that this process makes with them later. heard() is called by one thread; empty:
  // nobody is called any more.
  void tell_other_hosts(const std::string& text) const;
  void on_told(std::function<void(const std::string&)> heard) const;
  // Collective among all, after on_told(): from then on all can be told. Where it throws, nobody is
  // called any more, as on_told() and on_end() have it.
  void all_listen() const;

  // Liveness, where there are several processes.

  // Tells those that wait for this process, in a call that they make together, that it goes on, and
  // with what (96 bytes are kept). They wait their time anew.
  void heartbeat(const std::string& doing) const;

  // wake() is called, by any thread, when a process has gone. Empty: nobody is called any more.
  void on_end(std::function<void()> wake) const;
  // Whether a process has ended or a collective call has failed: nothing goes on any more.
  bool over() const;
  // Throws why, if that is so.
  void check() const;
  // Whether the process of this rank has closed its fabric.
  bool left(int rank) const;
  // Ends everything because the process of this rank has.
  void lost_because_left(int rank) const;
  // Ends everything because of a process, unless that has closed its fabric: `why` says what it
  // did.
  void lost(int process, const std::string& why) const;
  // This process has closed its fabric.
  void leave() const;
  // Whether this is a child that was forked from the process whose fabric this is.
  bool forked() const;

 private:
  int process_ = 0;
  int count_ = 1;
  std::vector<int> owners_;
  std::shared_ptr<Assembly> assembly_;
  int hosts_ = 1;
  Party everybody_;
  Party neighbours_;
};

}  // namespace asyncdiff
