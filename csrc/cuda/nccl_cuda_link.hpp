// Carries bundles by NCCL, on a stream of its own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "asyncdiff/memory.hpp"
#include "nccl_communicator.hpp"
#include "nccl_link.hpp"

namespace asyncdiff {

class NcclCudaLink final : public NcclLink {
 public:
  // Of a device of this process; see NcclCommunicator. Both sides at the same time. A first message
  // is exchanged, `word` being one in pinned memory, so that all is connected and loaded when this
  // returns. `carrying` is for what comes afterwards.
  NcclCudaLink(int device, const NcclUniqueId& id, int place, std::uint64_t* word,
               const NcclLimits& making, const NcclLimits& carrying);

  void send(const std::byte* from, std::size_t nbytes, const Publication& then) override;
  void receive(std::byte* to, std::size_t nbytes, const Publication& then) override;
  void check() override;
  void abort() noexcept override;
  // Gives all back. Together: nothing is in flight, and the other side does the same now. Without
  // it, memory and stream stay until the process ends.
  void close(bool together) noexcept;

 private:
  void publish(const Publication& then);
  void exchange_first(int place, std::uint64_t* word, const NcclLimits& limits);

  int device_;
  Buffer first_;  // of the first message; to free it would wait for the device
  cudaStream_t stream_ = nullptr;
  std::unique_ptr<NcclCommunicator> communicator_;
};

}  // namespace asyncdiff
