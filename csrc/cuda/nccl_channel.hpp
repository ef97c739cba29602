// A channel between GPUs on different hosts.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "asyncdiff/channel.hpp"
#include "asyncdiff/channel_device.hpp"
#include "nccl_shared.hpp"

namespace asyncdiff {

// For kernels it is a channel like those of one host, whose ends are both here: the sender's packs
// bundles into slots of its own device, and the receiver's waits on its own device. What lies
// between them is the courier's. So everything can be captured in graphs, and nothing of NCCL is in
// them.
class NcclChannel final : public Channel {
 public:
  // Collective among the ends, where this process has one.
  NcclChannel(std::shared_ptr<NcclShared> shared, Party ends, std::string name, int sender,
              int receiver, Layout layout, int slots);

  Buffer slot(int receiver, int slot) override;
  void begin(int slot, Stream stream) override;
  void push(std::size_t index, const void* data, int slot, Stream stream) override;
  void commit(int slot, Stream stream) override;
  void put(const std::vector<const void*>& tensors, int slot, Stream stream) override;
  void get(int receiver, int slot, Stream stream) override;
  void wait_for(int receiver, std::uint64_t count) override;
  void wait_free(std::uint64_t count) override;
  void release(int receiver, int slot, Stream stream) override;
  void close() override;

 private:
  void make_sender(std::uint32_t channel, std::shared_ptr<NcclLink> link);
  void make_receiver(std::uint32_t channel, std::shared_ptr<NcclLink> link);
  template <class End>
  std::shared_ptr<End> make_end(int rank, int peer, std::uint32_t channel,
                                std::shared_ptr<NcclLink> link) const;
  // Device memory of an end: so many lines, then all slots.
  void allocate(int rank, std::size_t lines);
  // Whether a part of a bundle may be on its way before the rest is pushed.
  bool in_parts() const { return layout().specs.size() > 1 && layout().nbytes >= 2 * kPieceBytes; }
  void check_open() const;
  // Throws unless this process runs the rank and all is open.
  void check_end(int rank, int slot) const;

  std::shared_ptr<NcclShared> shared_;
  Party ends_;
  std::atomic<bool> closed_{false};
  std::shared_ptr<NcclEndMemory> memory_;
  SenderDevice from_{};
  ReceiverDevice to_{};
  std::uint64_t* pushed_ = nullptr;  // a word for each tensor
};

}  // namespace asyncdiff
