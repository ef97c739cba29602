// When memory of a fabric of GPUs may be freed: not while a device may still write to it, nor while
// another process may have it mapped.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

#include "asyncdiff/channel_device.hpp"
#include "asyncdiff/memory.hpp"
#include "control_memory.hpp"
#include "topology.hpp"

namespace asyncdiff {

class Reclaimer {
 public:
  // Frees what earlier fabrics left behind.
  explicit Reclaimer(const Topology& topology);

  // Waits until the devices of own ranks have done what was enqueued. Before anything is freed:
  // freeing waits for the memory's own device only, but others write there, too.
  void settle() const noexcept;

  // What channels take of the fabric, for others to take when they are gone.
  struct Taken {
    std::vector<ControlMemory::Lines> lines;
    std::vector<const FailureRecord*> records;
  };

  // Takes what a channel had that is gone. Neither waits nor frees: a destructor may run at any
  // time, in the middle of a capture, too.
  void retire(std::vector<Buffer> memory, Taken taken);
  // Frees the memory of channels that are gone, and returns what they took.
  Taken free_retired();

  // Keeps memory of a channel until release(), or until it is let go: what others may map, and what
  // they own.
  void keep_exported(Buffer memory) { exported_.push_back(std::move(memory)); }
  void keep_imported(Buffer memory) { imported_.push_back(std::move(memory)); }
  enum class Kept { kExported, kImported };
  void let_go(const std::vector<std::byte*>& memory, Kept which);

  // A fabric that is closed, after settle(): unmaps what others own, and then frees what they may
  // have mapped, or keeps it for good where nobody says that they have unmapped it.
  void unmap() { imported_.clear(); }
  void release(std::vector<Buffer> exported, bool unmapped_everywhere);
  // A fabric that is not closed leaves all that it has to the next one.
  void leave(std::vector<Buffer> exported, std::vector<Buffer> local) noexcept;

  // Keeps what others may have mapped until the process ends.
  static void abandon(std::vector<Buffer> exported);

 private:
  const Topology& topology_;
  std::vector<Buffer> exported_;  // mailboxes of own ranks
  std::vector<Buffer> imported_;  // those of others
  std::mutex mutex_;              // guards all below
  std::vector<Buffer> memory_;
  Taken taken_;
};

}  // namespace asyncdiff
