// A channel between GPUs: copies by copy engines, signals by kernels of one thread.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "cuda_shared.hpp"

namespace asyncdiff {

// A receiver that its sender cannot write directly is staged: push copies to pinned host memory,
// and get copies on to the mailbox after its wait. Flags and credits then lie in host memory too.
class CudaChannel final : public Channel {
 public:
  CudaChannel(std::shared_ptr<CudaFabric::Shared> shared, std::string name, int sender,
              std::vector<int> receivers, Layout layout, int slots);

  Buffer slot(int receiver, int slot) override;
  void begin(int slot, Stream stream) override;
  void push(std::size_t index, const void* data, int slot, Stream stream) override;
  void commit(int slot, Stream stream) override;
  void put(const std::vector<const void*>& tensors, int slot, Stream stream, PutMode mode) override;
  void get(int receiver, int slot, Stream stream) override;
  void release(int receiver, int slot, Stream stream) override;

 private:
  struct Receiver {
    bool direct;
    int device;
    Buffer mailbox;  // all slots; only of own ranks
    ReceiverDevice handle;
  };

  // Allocates those of own ranks; where the sender sees each, or null where it does not.
  std::vector<std::byte*> make_mailboxes();
  // Throws unless this process runs the rank and the fabric is open.
  void check_end(int rank, int slot) const;
  std::size_t start_of(int slot) const { return layout().nbytes * static_cast<std::size_t>(slot); }
  int sender_device() const;

  std::shared_ptr<CudaFabric::Shared> shared_;
  SenderDevice handle_{};
  std::vector<Receiver> receivers_;
  Buffer staging_;  // all slots; empty where no receiver is staged
};

}  // namespace asyncdiff
