// Which process runs which rank, and what they do together.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
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
  int owner(int rank) const { return owners_[static_cast<std::size_t>(rank)]; }
  bool mine(int rank) const { return owner(rank) == process(); }
  // Throws InvalidArgument where a rank belongs to another process.
  void check_mine(int rank) const;

  Rendezvous& rendezvous() const { return *rendezvous_; }
  std::vector<std::string> all_gather(const std::string& mine) const;
  void barrier() const { all_gather(""); }

  // Does work that may throw an Error. Where it throws in one process, it throws in all: nobody
  // goes on alone, or waits for one that gave up.
  void together(const std::string& what, const std::function<void()>& work) const;

 private:
  std::vector<int> owners_;
  std::shared_ptr<Rendezvous> rendezvous_;
};

}  // namespace asyncdiff
