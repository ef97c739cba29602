// The flags, credits, counters and failure records of one channel.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda_shared.hpp"

namespace asyncdiff {

// Lines of control memory, taken while a channel is made. With it they are gone, also where making
// it fails; the fabric deals them out again where that is safe.
class ChannelFlags {
 public:
  explicit ChannelFlags(std::shared_ptr<CudaFabric::Shared> shared) : shared_(std::move(shared)) {}
  ~ChannelFlags();
  ChannelFlags(const ChannelFlags&) = delete;
  ChannelFlags& operator=(const ChannelFlags&) = delete;

  // Offset of the first of `count` lines of a rank, or of ControlMemory::kHost.
  std::size_t take(int rank, std::size_t count = 1);
  // A word in one of these lines that counts bundles.
  void add_count(int rank, std::size_t offset);
  // What bounds the waits of this end, with a failure record of its own; `claimed` is null where
  // this process does not run the rank.
  WaitContext add_end(int rank, const std::string& channel, unsigned* claimed);

 private:
  std::shared_ptr<CudaFabric::Shared> shared_;
  std::vector<ControlMemory::Lines> taken_;
};

}  // namespace asyncdiff
