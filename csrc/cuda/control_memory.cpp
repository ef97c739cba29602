#include "control_memory.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "check.hpp"
#include "cuda_memory.hpp"
#include "device_guard.hpp"
#include "failure_log.hpp"
#include "ipc.hpp"
#include "kernels.hpp"

namespace asyncdiff {

namespace {

// Whether a word at this offset lies in one of these lines.
bool contains(const std::vector<ControlMemory::Lines>& lines, int rank, std::size_t offset) {
  return std::any_of(lines.begin(), lines.end(), [&](const ControlMemory::Lines& l) {
    return l.rank == rank && offset >= l.first && offset < l.first + l.count * FlagPool::kLine;
  });
}

}  // namespace

ControlMemory::ControlMemory(const Topology& topology)
    : topology_(topology), pools_(topology.devices().size()), own_(topology.devices().size()) {
  const Processes& processes = topology.processes();
  processes.everybody().together("prepare its devices", [&] {
    for (int rank = 0; rank < topology.ranks(); ++rank) {
      if (!topology.mine(rank)) continue;
      const int device = topology.device(rank);
      const DeviceGuard guard(device);
      preload_kernels();
      own_[static_cast<std::size_t>(rank)] = processes.several()
                                                 ? allocate_exportable(device, FlagPool::kBytes)
                                                 : allocate_device(device, FlagPool::kBytes);
      // Of probes: the first lines, so that others know them.
      const auto ranks = static_cast<std::size_t>(topology.ranks());
      take(rank, ranks * kProbeBytes / FlagPool::kLine);
    }
  });
  const std::size_t lines = static_cast<std::size_t>(processes.count()) * FlagPool::kBytes;
  const Party& here = processes.neighbours();
  host_ = share_pinned(here, here.members().front(), topology.home(),
                       lines + FailureLog::nbytes(processes.count()));
}

std::size_t ControlMemory::host_part() const {
  return static_cast<std::size_t>(topology_.processes().process()) * FlagPool::kBytes;
}

Buffer ControlMemory::for_failures() const {
  const Processes& processes = topology_.processes();
  Buffer out = host_;
  out.data += static_cast<std::size_t>(processes.count()) * FlagPool::kBytes;
  out.nbytes = FailureLog::nbytes(processes.count());
  return out;
}

std::size_t ControlMemory::take(int rank, std::size_t count) {
  return pool(rank).take(count) + (rank == kHost ? host_part() : 0);
}

std::byte* ControlMemory::at(int rank, std::size_t offset, int viewer) const {
  if (rank == kHost) return host_.data + offset;
  if (topology_.mine(rank)) return own(rank).data + offset;
  return imported_.at({rank, topology_.device(viewer)}).data + offset;
}

void ControlMemory::reset(std::uint64_t first) {
  for (int rank = 0; rank < topology_.ranks(); ++rank) {
    if (topology_.mine(rank)) clear(own(rank), pool(rank).used());
  }
  std::memset(host_.data + host_part(), 0, host_pool_.used());
  // Words that arrived long ago must not look like those of the next bundles, whose tags begin at
  // first + 1: that many slots do not exist.
  const bool near_zero = static_cast<std::uint32_t>(first) > 0xffff0000u;
  for (const auto& weak : inline_words_) {
    const auto words = weak.lock();
    if (words) clear(*words, words->nbytes, near_zero ? 0x55 : 0);
  }
  if (first == 0) return;
  for (const auto& [rank, offset] : counts_) {
    if (rank == kHost) {
      std::memcpy(host_.data + offset, &first, sizeof first);
      continue;
    }
    const DeviceGuard guard(own(rank).device);
    check_cuda(cudaMemcpy(own(rank).data + offset, &first, sizeof first, cudaMemcpyDefault),
               "setting a count");
  }
}

void ControlMemory::give_back(const std::vector<Lines>& gone) {
  const auto forget = [](auto& from, auto which) {
    from.erase(std::remove_if(from.begin(), from.end(), which), from.end());
  };
  forget(counts_, [&](const auto& count) { return contains(gone, count.first, count.second); });
  forget(inline_words_, [](const auto& words) { return words.expired(); });
  for (const Lines& lines : gone) {
    Buffer part = lines.rank == kHost ? host_ : own(lines.rank);
    part.data += lines.first;
    clear(part, lines.count * FlagPool::kLine);
    pool(lines.rank).give_back(lines.first - (lines.rank == kHost ? host_part() : 0), lines.count);
  }
}

std::vector<Buffer> ControlMemory::take_exported() { return std::exchange(own_, {}); }

std::vector<Buffer> ControlMemory::take_local() {
  std::vector<Buffer> out;
  for (auto& [key, buffer] : imported_) out.push_back(std::move(buffer));
  imported_.clear();
  out.push_back(std::exchange(host_, {}));
  return out;
}

}  // namespace asyncdiff
