// What kernels do with a sender's end: wait for free slots, store to all receivers. For device code
// only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "asyncdiff/channel_wait.hpp"

namespace asyncdiff {

// A receiver's credit for each lane of one warp, looked at once before it is known which one is
// needed.
class Credit {
 public:
  __device__ explicit Credit(const SenderDevice& sender) {
    const auto lane = static_cast<int>(threadIdx.x);
    if (lane < sender.receivers) seen_ = ptx::load_acquire_system(sender.credits[lane]);
  }

  // Waits until every receiver has released what the slot of this epoch held before.
  __device__ bool wait(const SenderDevice& sender, std::uint64_t epoch, int slot) const {
    const auto lane = static_cast<int>(threadIdx.x);
    const std::uint64_t needed = epoch - static_cast<std::uint64_t>(sender.slots);
    bool good = true;
    if (lane < sender.receivers && static_cast<std::int64_t>(seen_ - needed) < 0) {
      good = wait_for(sender.context, sender.credits[lane], needed, Operation::kBegin, slot,
                      sender.ranks[lane]);
    }
    return __all_sync(~0u, good) != 0;
  }

 private:
  static_assert(kMaxReceivers <= kWarp, "a lane for each");
  std::uint64_t seen_ = 0;
};

// Inline: stores the 8 bytes of a slot that begin at `at`, a multiple of 8, to all receivers.
__device__ inline void write_inline(const SenderDevice& sender, int slot, std::uint64_t epoch,
                                    std::uint64_t at, std::uint64_t value) {
  const std::uint64_t tag = epoch << 32;
  const ptx::Words words{tag | (value & 0xffffffffu), tag | (value >> 32)};
  for (int t = 0; t < sender.targets; ++t) {
    ptx::store_words_relaxed_system(sender.target[t] + 2 * (sender.slot_nbytes * slot + at), words);
  }
}

}  // namespace asyncdiff
