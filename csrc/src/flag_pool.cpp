#include "flag_pool.hpp"

#include <cstddef>
#include <iterator>

#include "asyncdiff/errors.hpp"

namespace asyncdiff {

std::size_t FlagPool::take(std::size_t count) {
  const std::size_t bytes = count * kLine;
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const auto [first, there] = *it;
    if (there < bytes) continue;
    free_.erase(it);
    if (there > bytes) free_[first + bytes] = there - bytes;
    return first;
  }
  if (used_ + bytes > nbytes_) {
    throw Error(
        "the fabric has no room for more channels: use those again, or make another fabric");
  }
  const std::size_t first = used_;
  used_ += bytes;
  return first;
}

void FlagPool::give_back(std::size_t first, std::size_t count) {
  std::size_t bytes = count * kLine;
  const auto next = free_.lower_bound(first);
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == first) {
      first = before->first;
      bytes += before->second;
    }
  }
  if (next != free_.end() && first + bytes == next->first) {
    bytes += next->second;
    free_.erase(next);
  }
  free_[first] = bytes;
}

}  // namespace asyncdiff
