// What the channels of a CudaFabric share with it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/channel_device.hpp"
#include "asyncdiff/cuda_fabric.hpp"
#include "asyncdiff/errors.hpp"
#include "asyncdiff/processes.hpp"
#include "cuda_memory.hpp"
#include "flag_pool.hpp"
#include "launch.hpp"
#include "links.hpp"

namespace asyncdiff {

// An abort by the host, for all processes to read. All zero bits: there was none.
struct AbortNote {
  enum State : std::uint32_t { kNone = 0, kBeingWritten = 1, kThere = 2 };

  std::atomic<std::uint32_t> state;
  std::int32_t rank;
  char reason[504];
};

struct CudaFabric::Shared {
  Shared(Processes all, std::vector<int> indices, double deadline_seconds, Transport how);
  ~Shared();

  Processes processes;
  std::vector<int> devices;  // by rank; of another process's rank that process's index
  double deadline;
  std::map<std::pair<int, int>, Link> links;  // by rank
  std::vector<std::string> uuids;             // of devices, by rank

  std::mutex mutex;  // guards all below
  std::atomic<bool> closed{false};
  // FlagPool in pinned host memory: abort word, abort note, failure records, flags of staged
  // channels.
  Buffer host;
  FlagPool host_lines;
  std::uint64_t* abort_word = nullptr;
  AbortNote* note = nullptr;
  // FlagPool in each rank's device memory: counters, flags, credits. Every process takes the same
  // lines, and sees those of its own ranks and of those that its ranks can reach.
  std::vector<FlagPool> lines;
  std::vector<Buffer> own;                         // by rank; empty for others'
  std::map<std::pair<int, int>, Buffer> imported;  // by (rank, device that looks)
  std::vector<Buffer> mailboxes;                   // of own ranks
  std::vector<Buffer> foreign;                     // mailboxes of others'
  // In place of a rank: the lines in host memory.
  static constexpr int kHostLines = -1;
  struct Taken {
    int rank;
    std::size_t first;  // offset
    std::size_t count;
  };
  // What channels had that are gone. A destructor may run at any time, in the middle of a capture,
  // so that it neither waits nor frees: the next channel() and release() do.
  struct Retired {
    std::vector<Buffer> memory;
    std::vector<Taken> lines;
  };
  std::mutex retired_mutex;  // of its own: `mutex` may be held while Python runs
  Retired retired;

  // Words in the lines that count bundles: rank, or kHostLines, and offset.
  std::vector<std::pair<int, std::size_t>> counts;
  // Where inline words of channels lie that this process has to clear.
  std::vector<std::weak_ptr<Buffer>> inline_words;

  // One end of a channel: what its failure record belongs to.
  struct End {
    FailureRecord* record;
    std::size_t offset;  // in the lines in host memory
    int rank;
    std::string channel;
  };
  std::vector<End> ends;

  const Link& link(int from, int to) const { return links.at({from, to}); }
  // Where `viewer`, a rank of this process, sees a line of `rank`.
  std::byte* line(int rank, std::size_t offset, int viewer) const;
  FlagPool& lines_of(int rank) {
    return rank == kHostLines ? host_lines : lines[static_cast<std::size_t>(rank)];
  }
  void check_open() const {
    if (closed) throw Error("the fabric is closed");
  }
  void abort(int rank, const std::string& reason);
  void check();
  // All counts to `first`, everything else to zero.
  void reset(std::uint64_t first);
  // The fastest mode for a bundle, as the sender's process finds it. Collective.
  Mode fastest(int sender, const std::vector<int>& receivers, const Layout& layout);
  // Whether no other rank has the device of this one.
  bool alone(int rank) const { return alone_[static_cast<std::size_t>(rank)]; }
  // How this rank's kernels are launched.
  Launch launch_of(int rank) const { return alone(rank) ? Launch::kEarly : Launch::kOrdinary; }
  // The device for what belongs to none: of a rank of this process, or the current one where it has
  // no rank.
  int home() const;
  // Waits until the devices of own ranks have done what was enqueued. Before anything is freed:
  // freeing waits for the memory's own device only, but others write there, too.
  void settle() const noexcept;
  // Frees the memory of channels that are gone. Their lines are for deal_out_again(); it needs
  // `mutex`, which nobody may hold while this waits.
  std::vector<Taken> free_retired();
  // Forgets what lay in these lines, clears them, and lets others take them.
  void deal_out_again(const std::vector<Taken>& gone);
  // Frees what the fabric has, after settle(). Collective.
  void release();

 private:
  // Takes what the fabric has. Collective.
  void open(Transport how);
  void find_links(Transport how);
  std::set<int> own_devices() const;
  std::vector<bool> alone_;
};

}  // namespace asyncdiff
