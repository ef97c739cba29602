#include "asyncdiff/fabric.hpp"

#include <cmath>
#include <set>
#include <string>
#include <vector>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

void check_fabric(int ranks, double deadline) {
  if (ranks < 1) throw InvalidArgument("a fabric has at least one rank");
  if (!std::isfinite(deadline) || deadline <= 0 || deadline > 86400) {
    throw InvalidArgument("the deadline is a positive number of seconds, at most a day");
  }
}

Fabric::Fabric(int ranks, double deadline_seconds) : ranks_(ranks), deadline_(deadline_seconds) {
  check_fabric(ranks_, deadline_);
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

std::vector<int> Fabric::hosts() const {
  std::vector<int> out;
  for (int rank = 0; rank < ranks_; ++rank) out.push_back(processes().host(rank));
  return out;
}

Party Fabric::ends_of(int sender, const std::vector<int>& receivers) const {
  std::vector<int> all = receivers;
  all.push_back(sender);
  return processes().party_of(all);
}

std::vector<std::string> Fabric::all_gather(const std::string& mine, double seconds) const {
  if (!std::isfinite(seconds) || seconds <= 0 || seconds > 86400) {
    throw InvalidArgument("gathering waits for a positive number of seconds, at most a day");
  }
  return processes().all_gather(mine, seconds);
}

void Fabric::heartbeat(const std::string& doing) const { processes().heartbeat(doing); }

void Fabric::check_own(const Channel& channel) const {
  if (!made(channel)) {
    throw InvalidArgument("channel '" + channel.name() +
                          "' belongs to another fabric: use the one that made it");
  }
}

void Fabric::check_batch(const std::vector<Put>& puts) const {
  std::set<const Channel*> seen;
  for (const Put& put : puts) {
    if (put.channel == nullptr) throw InvalidArgument("a put needs a channel, this one is null");
    check_own(*put.channel);
    if (put.channel->sender() != puts.front().channel->sender()) {
      throw InvalidArgument("channels '" + puts.front().channel->name() + "' and '" +
                            put.channel->name() + "' have different senders: put one by one");
    }
    if (!seen.insert(put.channel.get()).second) {
      throw InvalidArgument("channel '" + put.channel->name() +
                            "' is named twice: its bundles go one after another");
    }
    put.channel->check_tensors(put.tensors);
  }
}

void Fabric::put_batch(const std::vector<Put>& puts, Stream stream) {
  check_batch(puts);
  for (const Put& put : puts) put.channel->put(put.tensors, put.slot, stream);
}

}  // namespace asyncdiff
