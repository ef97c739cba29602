#include "cuda_shared.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "asyncdiff/cuda_fabric.hpp"
#include "check.hpp"
#include "copy_text.hpp"
#include "device_guard.hpp"
#include "ipc.hpp"
#include "kernels.hpp"

namespace asyncdiff {

namespace {

// Words that devices and other processes write while this one reads.
std::uint64_t load_acquire(const std::uint64_t* word) {
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

const char* name_of(std::uint64_t operation) {
  switch (static_cast<Operation>(operation)) {
    case Operation::kBegin:
      return "begin";
    case Operation::kCommit:
      return "commit";
    case Operation::kGet:
      return "get";
    case Operation::kRelease:
      return "release";
  }
  return "unknown operation";
}

// What could not be given back because another process may still have it mapped.
std::vector<Buffer>& abandoned() {
  static auto* buffers = new std::vector<Buffer>;
  return *buffers;
}

// What fabrics left that were not closed, and the devices that may still be at work on it. The next
// fabric frees it.
struct Left {
  std::set<int> devices;
  std::vector<Buffer> buffers;
};

std::mutex left_mutex;  // guards both

std::vector<Left>& left_behind() {
  static auto* all = new std::vector<Left>;
  return *all;
}

void abandon(const std::vector<Buffer>& buffers) {
  const std::lock_guard lock(left_mutex);
  abandoned().insert(abandoned().end(), buffers.begin(), buffers.end());
}

// Freeing memory waits for all that its device was given to do. cudaDeviceSynchronize would, too,
// but break a capture that another thread has under way.
void wait_for(const std::set<int>& devices) noexcept {
  for (int device : devices) {
    quietly_on(device, [] {
      void* memory = nullptr;
      if (cudaMalloc(&memory, FlagPool::kBytes) == cudaSuccess) {
        cudaFree(memory);
      } else {
        cudaDeviceSynchronize();  // no memory left
      }
    });  // errors of kernels show again where somebody looks for them
  }
}

void free_left_behind() {
  std::vector<Left> all;
  {
    const std::lock_guard lock(left_mutex);  // not while waiting: destructors take it
    all.swap(left_behind());
  }
  for (const Left& left : all) wait_for(left.devices);
}

}  // namespace

CudaFabric::Shared::Shared(Processes all, std::vector<int> indices, double deadline_seconds,
                           Transport how)
    : processes(std::move(all)),
      devices(std::move(indices)),
      deadline(deadline_seconds),
      lines(devices.size()),
      own(devices.size()) {
  free_left_behind();
  try {
    open(how);
  } catch (...) {
    // Others may have opened the lines, and nobody will tell when they are done with them.
    imported.clear();
    if (processes.several()) abandon(own);
    throw;
  }
}

void CudaFabric::Shared::open(Transport how) {
  const int ranks = static_cast<int>(devices.size());
  processes.together("prepare its devices", [&] {
    const int count = cuda_device_count();
    for (int rank = 0; rank < ranks; ++rank) {
      if (!processes.mine(rank)) continue;
      const int device = devices[static_cast<std::size_t>(rank)];
      if (device < 0 || device >= count) {
        throw DeviceError("CUDA device " + std::to_string(device) + " does not exist: there " +
                          (count == 0   ? "is none (no GPU, or no driver)"
                           : count == 1 ? "is one, device 0"
                                        : "are " + std::to_string(count) + ", from 0"));
      }
      const DeviceGuard guard(device);
      preload_kernels();
      own[static_cast<std::size_t>(rank)] = processes.several()
                                                ? allocate_exportable(device, FlagPool::kBytes)
                                                : allocate_device(device, FlagPool::kBytes);
    }
  });
  host = share_pinned(processes, processes.owner(0), home(), FlagPool::kBytes);
  abort_word = reinterpret_cast<std::uint64_t*>(host.data + host_lines.take());
  static_assert(sizeof(AbortNote) <= 4 * FlagPool::kLine);
  note = reinterpret_cast<AbortNote*>(host.data + host_lines.take(4));
  find_links(how);
  for (const std::string& uuid : uuids) {
    alone_.push_back(std::count(uuids.begin(), uuids.end(), uuid) == 1);
  }
}

CudaFabric::Shared::~Shared() {
  if (closed) return;
  try {
    Left left{own_devices(), std::move(retired.memory)};
    const auto keep = [&](std::vector<Buffer>& buffers, std::vector<Buffer>& where) {
      for (Buffer& buffer : buffers) where.push_back(std::move(buffer));
    };
    for (auto& [key, buffer] : imported) left.buffers.push_back(std::move(buffer));
    keep(foreign, left.buffers);
    left.buffers.push_back(std::move(host));
    const std::lock_guard lock(left_mutex);
    // What others have mapped is not to be freed before they unmap it, which nobody will tell.
    std::vector<Buffer>& where = processes.several() ? abandoned() : left.buffers;
    keep(own, where);
    keep(mailboxes, where);
    left_behind().push_back(std::move(left));
  } catch (...) {
  }
}

std::byte* CudaFabric::Shared::line(int rank, std::size_t offset, int viewer) const {
  if (processes.mine(rank)) return own[static_cast<std::size_t>(rank)].data + offset;
  return imported.at({rank, devices[static_cast<std::size_t>(viewer)]}).data + offset;
}

void CudaFabric::Shared::abort(int rank, const std::string& reason) {
  std::uint32_t none = AbortNote::kNone;
  if (note->state.compare_exchange_strong(none, AbortNote::kBeingWritten)) {
    note->rank = rank;
    copy_text(note->reason, reason);
    note->state.store(AbortNote::kThere, std::memory_order_release);
  }
  __atomic_store_n(abort_word, 1, __ATOMIC_RELEASE);
}

void CudaFabric::Shared::check() {
  check_open();
  if (load_acquire(abort_word) == 0) return;
  const End* first = nullptr;
  for (const End& end : ends) {
    if (load_acquire(&end.record->kind) == 0) continue;
    if (first == nullptr || end.record->time < first->record->time) first = &end;
  }
  if (first != nullptr) {
    const FailureRecord& r = *first->record;
    const Incident incident{
        first->rank, static_cast<int>(r.peer), first->channel, static_cast<int>(r.slot), r.expected,
        r.seen,      name_of(r.operation)};
    if (static_cast<FailureKind>(r.kind) == FailureKind::kTimeout) {
      throw ExchangeTimeout(incident, deadline);
    }
    throw SlotOrderError(incident);
  }
  if (note->state.load(std::memory_order_acquire) == AbortNote::kThere) {
    throw Aborted(note->rank, note->reason);
  }
  throw Aborted(-1, "no reason was left");
}

void CudaFabric::Shared::reset(std::uint64_t first) {
  for (std::size_t rank = 0; rank < own.size(); ++rank) {
    if (own[rank].data != nullptr) clear(own[rank], lines[rank].used());
  }
  if (processes.mine(0)) clear(host, host_lines.used());
  // Words that arrived long ago must not look like those of the next bundles, whose tags begin at
  // first + 1: that many slots do not exist.
  const bool near_zero = static_cast<std::uint32_t>(first) > 0xffff0000u;
  for (const auto& weak : inline_words) {
    const auto words = weak.lock();
    if (words) clear(*words, words->nbytes, near_zero ? 0x55 : 0);
  }
  if (first == 0) return;
  for (const auto& [rank, offset] : counts) {
    if (!processes.mine(rank < 0 ? 0 : rank)) continue;
    if (rank < 0) {
      std::memcpy(host.data + offset, &first, sizeof first);
      continue;
    }
    const Buffer& memory = own[static_cast<std::size_t>(rank)];
    const DeviceGuard guard(memory.device);
    check_cuda(cudaMemcpy(memory.data + offset, &first, sizeof first, cudaMemcpyDefault),
               "setting a count");
  }
}

Mode CudaFabric::Shared::fastest(int sender, const std::vector<int>& receivers,
                                 const Layout& layout) {
  char mine = 0;
  processes.together("measure puts", [&] {
    if (!processes.mine(sender)) return;
    const int from = devices[static_cast<std::size_t>(sender)];
    const int first = receivers.front();
    bool staged = false;
    for (int rank : receivers) staged = staged || !link(sender, rank).direct;
    // A staged receiver's device need not even be visible here; any way through host memory will
    // do.
    const int to = staged ? from : device_of(uuids[static_cast<std::size_t>(first)]);
    const PutCosts costs = put_costs(from, to, staged ? Transport::kStaged : Transport::kPeer);
    Mode best = costs.fastest(layout.nbytes, layout.specs.size(), receivers.size());
    if (layout.specs.size() > static_cast<std::size_t>(ManyPuts::kMaxPieces)) best = Mode::kCopy;
    mine = static_cast<char>(best);
  });
  if (!processes.several()) return static_cast<Mode>(mine);
  const auto owner = static_cast<std::size_t>(processes.owner(sender));
  return static_cast<Mode>(processes.all_gather(std::string(1, mine))[owner][0]);
}

std::set<int> CudaFabric::Shared::own_devices() const {
  std::set<int> out;
  for (std::size_t rank = 0; rank < devices.size(); ++rank) {
    if (processes.mine(static_cast<int>(rank))) out.insert(devices[rank]);
  }
  return out;
}

int CudaFabric::Shared::home() const {
  const std::set<int> all = own_devices();
  if (!all.empty()) return *all.begin();
  int device = 0;
  cudaGetDevice(&device);
  cudaGetLastError();  // who uses the device will see
  return device;
}

void CudaFabric::Shared::settle() const noexcept { wait_for(own_devices()); }

std::vector<CudaFabric::Shared::Taken> CudaFabric::Shared::free_retired() {
  Retired gone;
  {
    const std::lock_guard lock(retired_mutex);
    std::swap(gone, retired);
  }
  if (!gone.memory.empty() || !gone.lines.empty()) settle();
  return std::move(gone.lines);
}

void CudaFabric::Shared::deal_out_again(const std::vector<Taken>& gone) {
  if (gone.empty()) return;
  if (load_acquire(abort_word) != 0) {
    // check() has still to tell what failed.
    const std::lock_guard lock(retired_mutex);
    retired.lines.insert(retired.lines.end(), gone.begin(), gone.end());
    return;
  }
  std::set<std::pair<int, std::size_t>> all;
  for (const Taken& taken : gone) {
    for (std::size_t i = 0; i < taken.count; ++i) {
      all.emplace(taken.rank, taken.first + i * FlagPool::kLine);
    }
  }
  const auto is_gone = [&all](int rank, std::size_t offset) {
    return all.count({rank, offset / FlagPool::kLine * FlagPool::kLine}) != 0;
  };
  const auto forget = [](auto& from, auto which) {
    from.erase(std::remove_if(from.begin(), from.end(), which), from.end());
  };
  forget(ends, [&](const End& end) { return is_gone(kHostLines, end.offset); });
  forget(counts, [&](const auto& count) { return is_gone(count.first, count.second); });
  forget(inline_words, [](const auto& words) { return words.expired(); });
  for (const Taken& taken : gone) {
    Buffer part = taken.rank == kHostLines ? host : own[static_cast<std::size_t>(taken.rank)];
    part.data += taken.first;
    clear(part, taken.count * FlagPool::kLine);
    lines_of(taken.rank).give_back(taken.first, taken.count);
  }
}

void CudaFabric::Shared::release() {
  const bool failed = load_acquire(abort_word) != 0;
  closed = true;
  ends.clear();
  // Unmap what others own before they free it, and the other way round.
  imported.clear();
  foreign.clear();
  std::exception_ptr failure;
  bool all_here = !processes.several();
  if (processes.several() && !failed) {
    try {
      processes.barrier();
      all_here = true;
    } catch (...) {
      failure = std::current_exception();
    }
  }
  if (!all_here) {
    abandon(own);
    abandon(mailboxes);
  }
  own.clear();
  mailboxes.clear();
  {
    const std::lock_guard lock(retired_mutex);
    retired = {};
  }
  host = {};
  if (failure) std::rethrow_exception(failure);
}

}  // namespace asyncdiff
