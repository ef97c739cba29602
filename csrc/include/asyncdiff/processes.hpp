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

class ASYNCDIFF_EXPORT Processes {
 public:
  // One process that runs all ranks.
  explicit Processes(int ranks);
  // Rank r runs in process owners[r]. Throws InvalidArgument for a process that does not exist.
  Processes(std::vector<int> owners, std::shared_ptr<Rendezvous> rendezvous);

  bool several() const { return rendezvous_ != nullptr; }
  int process() const { return rendezvous_ ? rendezvous_->process() : 0; }
  int count() const { return rendezvous_ ? rendezvous_->processes() : 1; }
  const std::vector<int>& owners() const { return owners_; }
  int owner(int rank) const { return owners_[static_cast<std::size_t>(rank)]; }
  bool mine(int rank) const { return owner(rank) == process(); }
  // Throws InvalidArgument where a rank belongs to another process.
  void check_mine(int rank) const;

  Rendezvous& rendezvous() const { return *rendezvous_; }
  std::vector<std::string> all_gather(const std::string& mine) const;
  void barrier() const { all_gather(""); }

  // Does work that may throw. Where it throws in one process, it throws in all: nobody goes on
  // alone, or waits for one that gave up.
  void together(const std::string& what, const std::function<void()>& work) const;

  // The values of a call that all processes make, by what they are, as this one makes it.
  using Values = std::vector<std::pair<std::string, std::string>>;
  // Makes sure that all processes make the same call, `what`, with the same values; describe() may
  // throw, as the work of together(). Throws InvalidArgument, naming the first value that differs
  // and the process in which it does.
  void agree(const std::string& what, const std::function<Values()>& describe) const;

 private:
  // What went wrong in work(), where something did: the text for others, and what this process
  // throws.
  struct Failure {
    std::string text;
    std::exception_ptr error;
  };
  static Failure failure_of(const std::function<void()>& work);
  void throw_any(const std::string& what, const Failure& mine,
                 const std::vector<std::string>& all) const;

  std::vector<int> owners_;
  std::shared_ptr<Rendezvous> rendezvous_;
};

}  // namespace asyncdiff
