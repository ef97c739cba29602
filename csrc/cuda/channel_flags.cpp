#include "channel_flags.hpp"

#include <cstddef>
#include <string>
#include <utility>

namespace asyncdiff {

ChannelFlags::~ChannelFlags() {
  if (shared_->closed || others_) return;
  shared_->reclaimer.retire({}, std::move(taken_));
}

std::size_t ChannelFlags::take(int rank, std::size_t count) {
  const std::size_t first = shared_->control.take(rank, count);
  taken_.lines.push_back({rank, first, count});
  return first;
}

void ChannelFlags::add_count(int rank, std::size_t offset) {
  shared_->control.add_count(rank, offset);
}

WaitContext ChannelFlags::add_end(int rank, const std::string& channel, unsigned* claimed) {
  const WaitContext out = shared_->failures.add_end(rank, channel, claimed);
  taken_.records.push_back(out.record);
  return out;
}

}  // namespace asyncdiff
