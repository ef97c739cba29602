// Device memory that whoever looks at it may drop at any time, as a tensor of the user's does.
#pragma once

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "asyncdiff/memory.hpp"

namespace asyncdiff {

// Freeing device memory waits for the device, so for whatever waits there, perhaps for what the
// caller is yet to do: then both would wait until the deadline. So who drops lent memory last
// leaves it here, until somebody frees it where waiting does no harm.
class LentMemory {
 public:
  Buffer lend(const Buffer& memory) const {
    Buffer out = memory;
    void* const place = memory.owner.get();
    out.owner = std::shared_ptr<void>(place, [dropped = dropped_, owner = memory.owner](
                                                 void*) mutable { take(*dropped, owner); });
    return out;
  }

  // Frees what was dropped.
  void free_dropped() noexcept {
    std::vector<std::shared_ptr<void>> all;  // freed without the lock
    const std::lock_guard lock(dropped_->mutex);
    all.swap(dropped_->memory);
  }

  // The same; what is dropped later is freed at once.
  void end() noexcept {
    {
      const std::lock_guard lock(dropped_->mutex);
      dropped_->ended = true;
    }
    free_dropped();
  }

 private:
  struct Dropped {
    std::mutex mutex;  // guards all below
    bool ended = false;
    std::vector<std::shared_ptr<void>> memory;
  };

  // Of two views that are dropped at the same time the second one sees that it is the last.
  static void take(Dropped& dropped, std::shared_ptr<void>& owner) noexcept {
    std::shared_ptr<void> freed;
    const std::lock_guard lock(dropped.mutex);
    if (owner.use_count() > 1) {
      owner.reset();
    } else if (dropped.ended) {
      freed = std::move(owner);
    } else {
      try {
        dropped.memory.push_back(owner);
        owner.reset();
      } catch (...) {  // no room for it here
        freed = std::move(owner);
      }
    }
  }

  std::shared_ptr<Dropped> dropped_ = std::make_shared<Dropped>();
};

}  // namespace asyncdiff
