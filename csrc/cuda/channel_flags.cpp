#include "channel_flags.hpp"

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

namespace asyncdiff {

ChannelFlags::~ChannelFlags() {
  CudaFabric::Shared& all = *shared_;
  if (all.closed) return;
  // Other processes would have to take them back at the same point of the order.
  if (all.processes.several()) return;
  const std::lock_guard lock(all.retired_mutex);
  all.retired.lines.insert(all.retired.lines.end(), taken_.begin(), taken_.end());
}

std::size_t ChannelFlags::take(int rank, std::size_t count) {
  const std::size_t first = shared_->lines_of(rank).take(count);
  taken_.push_back({rank, first, count});
  return first;
}

void ChannelFlags::add_count(int rank, std::size_t offset) {
  shared_->counts.emplace_back(rank, offset);
}

WaitContext ChannelFlags::new_end(int rank, const std::string& channel) {
  const std::size_t offset = take(CudaFabric::Shared::kHostLines);
  auto* record = reinterpret_cast<FailureRecord*>(shared_->host.data + offset);
  shared_->ends.push_back({record, offset, rank, channel});
  return {shared_->abort_word, record, static_cast<std::uint64_t>(shared_->deadline * 1e9)};
}

}  // namespace asyncdiff
