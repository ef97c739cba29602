// A channel between GPUs: copies by copy engines between two signals, or fused kernels.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "channel_flags.hpp"
#include "cuda_shared.hpp"
#include "kernels.hpp"

namespace asyncdiff {

// A receiver that its sender cannot write directly is staged: the sender writes to pinned host
// memory, and get copies on to the mailbox after its wait. Flags and credits then lie in host
// memory too.
class CudaChannel final : public Channel {
 public:
  // Collective among the ends, where this process has one.
  CudaChannel(std::shared_ptr<CudaFabric::Shared> shared, Party ends, std::string name, int sender,
              std::vector<int> receivers, Layout layout, int slots, Mode mode);
  ~CudaChannel() override;

  Buffer slot(int receiver, int slot) override;
  void begin(int slot, Stream stream) override;
  void push(std::size_t index, const void* data, int slot, Stream stream) override;
  void commit(int slot, Stream stream) override;
  void put(const std::vector<const void*>& tensors, int slot, Stream stream) override;
  void get(int receiver, int slot, Stream stream) override;
  void release(int receiver, int slot, Stream stream) override;
  void close() override;

  // What kernels need of a receiver that this process runs.
  const ReceiverDevice& receiver_device(int receiver) const;
  bool of(const CudaFabric::Shared& fabric) const { return shared_.get() == &fabric; }
  // Throws unless these tensors can be put into this slot by this process.
  void check_put(const std::vector<const void*>& tensors, int slot) const;
  // Adds this channel's next bundle to a fused put. False, and nothing added, without room.
  bool add_to(ManyPuts& puts, const std::vector<const void*>& tensors, int slot) const;

 private:
  struct Receiver {
    bool direct;
    int device;
    std::size_t arrived;  // where its flags and its credit lie: offsets of lines
    std::size_t credit;
    std::byte* seen;  // where the sender sees what it writes; null where it does not see it
    Buffer mailbox;   // all slots; only of own ranks
    // Inline words for all slots, where direct; one buffer with the fabric, which clears it.
    std::shared_ptr<Buffer> words;
    ReceiverDevice handle;
  };

  bool inlined() const { return mode() == Mode::kInline; }
  // Bytes of all slots where they arrive.
  std::size_t landing_nbytes() const { return (inlined() ? 2 : 1) * start_of(slots()); }
  std::shared_ptr<Buffer> keep_words(Buffer memory);
  // In which lines of a receiver's flags, and of its credit, lie: a rank's, or
  // ControlMemory::kHost.
  int flags_at(std::size_t i) const {
    return receivers_[i].direct ? receivers()[i] : ControlMemory::kHost;
  }
  int credit_at(std::size_t i) const {
    return receivers_[i].direct ? sender() : ControlMemory::kHost;
  }
  // Makes what this process has to make for the others to see, and returns what they need for that.
  std::string make_own();
  void make_mailbox(Receiver& receiver, std::string& exported);
  // What the others made, by process.
  void open_others(const std::vector<std::string>& made);
  void make_sender();
  void make_receiver(std::size_t i);
  // Throws unless this process runs the rank and all is open.
  void check_end(int rank, int slot) const;
  void check_open() const;
  std::size_t start_of(int slot) const { return layout().nbytes * static_cast<std::size_t>(slot); }
  int sender_device() const;

  std::shared_ptr<CudaFabric::Shared> shared_;
  Party ends_;
  std::atomic<bool> closed_{false};
  // Of this process's memory that others map, and of others' that it maps: as the reclaimer has it.
  std::vector<std::byte*> mapped_;
  ChannelFlags flags_;
  SenderDevice handle_{};
  std::optional<LinkDevice> link_;  // of the sender, where it is simulated
  std::vector<Receiver> receivers_;
  std::shared_ptr<Buffer> staging_;  // all slots; null where no receiver is staged
};

}  // namespace asyncdiff
