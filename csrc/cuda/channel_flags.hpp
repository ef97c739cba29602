// The control lines of one channel.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda_shared.hpp"

namespace asyncdiff {

// Taken while a channel is made. With it they are gone, also where making it fails; the fabric
// deals them out again where that is safe. Every process of a fabric takes the same lines in the
// same order, those that it does not use included.
class ChannelFlags {
 public:
  explicit ChannelFlags(std::shared_ptr<CudaFabric::Shared> shared) : shared_(std::move(shared)) {}
  ~ChannelFlags();
  ChannelFlags(const ChannelFlags&) = delete;
  ChannelFlags& operator=(const ChannelFlags&) = delete;

  // Offset of the first of `count` lines of a rank, or of CudaFabric::Shared::kHostLines.
  std::size_t take(int rank, std::size_t count = 1);
  // A word in one of these lines that counts bundles.
  void add_count(int rank, std::size_t offset);
  // What bounds the waits of this end, with a failure record of its own.
  WaitContext new_end(int rank, const std::string& channel);

 private:
  std::shared_ptr<CudaFabric::Shared> shared_;
  std::vector<CudaFabric::Shared::Taken> taken_;
};

}  // namespace asyncdiff
