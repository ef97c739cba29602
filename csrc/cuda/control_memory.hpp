// The words that ranks count in and wait on, in lines of memory that all of them see.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "asyncdiff/memory.hpp"
#include "flag_pool.hpp"
#include "topology.hpp"

namespace asyncdiff {

// Lines in each rank's device memory: counters, flags, credits. Lines in pinned host memory, a part
// for each process: the flags and credits of staged channels. A process deals out the lines of its
// own ranks, and of its part, by itself; it sees those in host memory, those of its own ranks and
// those of ranks that its own can reach.
class ControlMemory {
 public:
  // In place of a rank: this process's lines in host memory.
  static constexpr int kHost = -1;

  struct Lines {
    int rank;
    std::size_t first;  // offset
    std::size_t count;
  };

  // Allocates all of it and loads the kernels onto this process's devices. Collective.
  explicit ControlMemory(const Topology& topology);

  // The offset in bytes of the first of `count` lines, of a rank of this process or of kHost.
  std::size_t take(int rank, std::size_t count = 1);
  // Where `viewer`, a rank of this process, sees a line of `rank`, or, for kHost, of any process.
  std::byte* at(int rank, std::size_t offset, int viewer) const;
  // Behind the lines in host memory: for the failure log.
  Buffer for_failures() const;
  // A place for a probe of each link to a rank, the same for all of them.
  std::size_t probe(int from) const { return static_cast<std::size_t>(from) * kProbeBytes; }
  // The lines of a rank of this process.
  const Buffer& own(int rank) const { return own_[static_cast<std::size_t>(rank)]; }
  // The lines of another process's rank, as a device of this process sees them: to be filled in by
  // who opens them.
  Buffer& imported(int rank, int device) { return imported_[{rank, device}]; }

  // A word in one of the lines that counts bundles.
  void add_count(int rank, std::size_t offset) { counts_.emplace_back(rank, offset); }
  // Where the inline words of a channel lie that this process has to clear.
  void add_inline_words(const std::shared_ptr<Buffer>& words) { inline_words_.push_back(words); }
  // All counts of this process to `first`, everything else of it to zero. Nothing may be in flight.
  void reset(std::uint64_t first);
  // Clears these lines, forgets what they counted, and lets others take them.
  void give_back(const std::vector<Lines>& gone);
  // Gives away what other processes may have mapped, the lines of own ranks.
  std::vector<Buffer> take_exported();
  // Gives away the rest: the lines in host memory, and those of other processes.
  std::vector<Buffer> take_local();

 private:
  // Where this process's lines in host memory begin.
  std::size_t host_part() const;
  FlagPool& pool(int rank) {
    return rank == kHost ? host_pool_ : pools_[static_cast<std::size_t>(rank)];
  }

  const Topology& topology_;
  Buffer host_;
  FlagPool host_pool_;
  std::vector<FlagPool> pools_;                     // by rank
  std::vector<Buffer> own_;                         // by rank; empty for others'
  std::map<std::pair<int, int>, Buffer> imported_;  // by (rank, device that looks)
  std::vector<std::pair<int, std::size_t>> counts_;
  std::vector<std::weak_ptr<Buffer>> inline_words_;
};

}  // namespace asyncdiff
