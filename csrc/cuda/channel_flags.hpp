// The flags, credits, counters and failure records of one channel, as far as this process deals
// them out.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda_shared.hpp"

namespace asyncdiff {

// Lines of control memory, taken while a channel is made. With it they are gone, also where making
// it fails; the fabric deals them out again where that is safe: not where another process may still
// write to them.
class ChannelFlags {
 public:
  ChannelFlags(std::shared_ptr<CudaFabric::Shared> shared, bool others)
      : shared_(std::move(shared)), others_(others) {}
  ~ChannelFlags();
  ChannelFlags(const ChannelFlags&) = delete;
  ChannelFlags& operator=(const ChannelFlags&) = delete;

  // Offset of the first of `count` lines of a rank of this process, or of ControlMemory::kHost.
  std::size_t take(int rank, std::size_t count = 1);
  // A word in one of these lines that counts bundles.
  void add_count(int rank, std::size_t offset);
  // What bounds the waits of this end, with a failure record of its own.
  WaitContext add_end(int rank, const std::string& channel, unsigned* claimed);
  // No other process writes to them any more.
  void others_are_done() { others_ = false; }

 private:
  std::shared_ptr<CudaFabric::Shared> shared_;
  bool others_;  // whether other processes may write to them
  Reclaimer::Taken taken_;
};

}  // namespace asyncdiff
