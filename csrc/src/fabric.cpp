#include "asyncdiff/fabric.hpp"

#include <cmath>
#include <set>
#include <vector>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

Fabric::Fabric(int ranks, double deadline_seconds) : ranks_(ranks), deadline_(deadline_seconds) {
  if (ranks < 1) throw InvalidArgument("a fabric has at least one rank");
  if (!std::isfinite(deadline_) || deadline_ <= 0 || deadline_ > 86400) {
    throw InvalidArgument("the deadline is a positive number of seconds, at most a day");
  }
}

void Fabric::check_endpoints(int sender, const std::vector<int>& receivers, int slots) const {
  const auto check_rank = [this](int rank) {
    if (rank < 0 || rank >= ranks_) {
      throw InvalidArgument("rank " + std::to_string(rank) + ": the fabric has ranks 0 to " +
                            std::to_string(ranks_ - 1));
    }
  };
  check_rank(sender);
  if (receivers.empty()) throw InvalidArgument("a channel needs at least one receiver");
  std::set<int> seen;
  for (int receiver : receivers) {
    check_rank(receiver);
    if (receiver == sender) {
      throw InvalidArgument("rank " + std::to_string(sender) + " cannot receive from itself");
    }
    if (!seen.insert(receiver).second) {
      throw InvalidArgument("rank " + std::to_string(receiver) + " is named twice as a receiver");
    }
  }
  if (slots < 1 || slots > 1024) throw InvalidArgument("a channel has 1 to 1024 slots");
}

}  // namespace asyncdiff
