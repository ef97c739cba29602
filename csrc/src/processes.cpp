#include "asyncdiff/processes.hpp"

#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

Processes::Processes(int ranks) : owners_(static_cast<std::size_t>(ranks), 0) {}

Processes::Processes(std::vector<int> owners, std::shared_ptr<Rendezvous> rendezvous)
    : owners_(std::move(owners)), rendezvous_(std::move(rendezvous)) {
  if (process() < 0 || process() >= count()) {
    throw InvalidArgument("the rendezvous calls this process " + std::to_string(process()) +
                          " of " + std::to_string(count()));
  }
  for (int owner : owners_) {
    if (owner < 0 || owner >= count()) {
      throw InvalidArgument("owners names process " + std::to_string(owner) +
                            ", but the rendezvous has processes 0 to " +
                            std::to_string(count() - 1));
    }
  }
}

void Processes::check_mine(int rank) const {
  if (!mine(rank)) {
    throw InvalidArgument("rank " + std::to_string(rank) + " belongs to process " +
                          std::to_string(owner(rank)) + ", this is process " +
                          std::to_string(process()));
  }
}

std::vector<std::string> Processes::all_gather(const std::string& mine) const {
  if (!rendezvous_) return {mine};
  return rendezvous_->all_gather(mine);
}

void Processes::together(const std::string& what, const std::function<void()>& work) const {
  if (!several()) return work();
  std::string failure;
  std::exception_ptr mine;
  try {
    work();
  } catch (const Error& error) {
    failure = error.what();
    mine = std::current_exception();
  }
  const auto failures = all_gather(failure);
  if (mine) std::rethrow_exception(mine);
  for (std::size_t i = 0; i < failures.size(); ++i) {
    if (!failures[i].empty()) {
      throw Error("process " + std::to_string(i) + " could not " + what + ": " + failures[i]);
    }
  }
}

}  // namespace asyncdiff
