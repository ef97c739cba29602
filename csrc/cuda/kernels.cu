// The signal kernels (wait for an epoch, publish an epoch; copy engines move the data between them)
// and the fused put, which does all of it.
#include <cstddef>
#include <cstdint>

#include "check.hpp"
#include "kernels.hpp"
#include "ptx.cuh"

namespace asyncdiff {

namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 512;           // of a block of a fused put
constexpr std::uint64_t kTile = 16384;  // bytes that a block copies at a time

// Between two looks at the clock and at the abort word, which lies in host memory.
constexpr int kPolls = 256;

__device__ void fail(const Guard& guard, FailureKind kind, Operation operation, int slot,
                     std::uint64_t expected, std::uint64_t seen, int peer) {
  FailureRecord& record = *guard.record;
  if (ptx::load_relaxed_system(&record.kind) == 0) {  // the first failure of this end counts
    record.operation = static_cast<std::uint64_t>(operation);
    record.slot = static_cast<std::uint64_t>(slot);
    record.expected = expected;
    record.seen = seen;
    record.peer = peer;
    record.time = ptx::global_nanoseconds();
    ptx::store_release_system(&record.kind, static_cast<std::uint64_t>(kind));
  }
  ptx::store_release_system(guard.abort, 1);
}

// Whether this operation is on the right slot: done bundles came before it.
__device__ bool in_turn(const Guard& guard, Operation operation, int slot, std::uint64_t done,
                        bool allowed, int slots) {
  const std::uint64_t next = done % static_cast<std::uint64_t>(slots);
  if (allowed && next == static_cast<std::uint64_t>(slot)) return true;
  // After an abort the counters mean nothing any more.
  if (ptx::load_relaxed_system(guard.abort) == 0) {
    fail(guard, FailureKind::kSlotOrder, operation, slot, next, done, -1);
  }
  return false;
}

// Waits until *word >= needed. False after the deadline or an abort.
__device__ bool wait_for(const Guard& guard, const std::uint64_t* word, std::uint64_t needed,
                         Operation operation, int slot, int peer) {
  std::uint64_t seen = ptx::load_acquire_system(word);
  if (seen >= needed) return true;
  const std::uint64_t begun = ptx::global_nanoseconds();
  while (true) {
    if (ptx::load_relaxed_system(guard.abort) != 0) return false;
    for (int i = 0; i < kPolls; ++i) {
      seen = ptx::load_acquire_system(word);
      if (seen >= needed) return true;
    }
    if (ptx::global_nanoseconds() - begun > guard.deadline_ns) {
      fail(guard, FailureKind::kTimeout, operation, slot, needed, seen, peer);
      return false;
    }
  }
}

// Whether it holds in every lane of the warp.
__device__ bool everywhere(bool mine) { return __all_sync(~0u, mine) != 0; }

// One warp. Waits until every receiver has released what the slot of this epoch held before.
__device__ bool wait_for_credits(const SenderDevice& sender, std::uint64_t epoch, int slot) {
  const std::uint64_t slots = static_cast<std::uint64_t>(sender.slots);
  const std::uint64_t needed = epoch > slots ? epoch - slots : 0;
  bool good = true;
  for (int i = threadIdx.x; i < sender.receivers; i += kWarp) {
    good = good && wait_for(sender.guard, sender.credits[i], needed, Operation::kBegin, slot,
                            sender.ranks[i]);
  }
  return everywhere(good);
}

__global__ void begin_kernel(SenderDevice sender, int slot) {
  SenderCounters& counters = *sender.counters;
  const std::uint64_t done = counters.begun;
  bool good = true;
  if (threadIdx.x == 0) {
    good = in_turn(sender.guard, Operation::kBegin, slot, done, done == counters.committed,
                   sender.slots);
    if (good) counters.begun = done + 1;
  }
  if (everywhere(good)) wait_for_credits(sender, done + 1, slot);
}

__global__ void commit_kernel(SenderDevice sender, int slot) {
  SenderCounters& counters = *sender.counters;
  const std::uint64_t epoch = counters.committed + 1;
  bool good = true;
  if (threadIdx.x == 0) {
    good = in_turn(sender.guard, Operation::kCommit, slot, epoch - 1, epoch <= counters.begun,
                   sender.slots);
    if (good) counters.committed = epoch;
  }
  if (!everywhere(good)) return;
  for (int i = threadIdx.x; i < sender.receivers * sender.flags; i += kWarp) {
    std::uint64_t* first = sender.arrived[i / sender.flags];
    ptx::store_release_system(first + i % sender.flags * kFlagStride, epoch);
  }
}

__global__ void get_kernel(ReceiverDevice receiver, int slot) {
  ReceiverCounters& counters = *receiver.counters;
  const std::uint64_t done = counters.got;
  bool good = true;
  if (threadIdx.x == 0) {
    good = in_turn(receiver.guard, Operation::kGet, slot, done, true, receiver.slots);
    if (good) counters.got = done + 1;
  }
  if (everywhere(good) && static_cast<int>(threadIdx.x) < receiver.flags) {
    wait_for(receiver.guard, receiver.arrived + threadIdx.x * kFlagStride, done + 1,
             Operation::kGet, slot, receiver.sender_rank);
  }
}

__global__ void release_kernel(ReceiverDevice receiver, int slot) {
  if (threadIdx.x != 0) return;
  ReceiverCounters& counters = *receiver.counters;
  if (!in_turn(receiver.guard, Operation::kRelease, slot, counters.released,
               counters.released < counters.got, receiver.slots)) {
    return;
  }
  ptx::store_release_system(receiver.credit, ++counters.released);
}

// Loads each word once and stores it to all targets.
template <class Word>
__device__ void copy_words(const SenderDevice& sender, const std::byte* source, std::uint64_t start,
                           std::uint64_t from, std::uint64_t to) {
  for (std::uint64_t i = from + threadIdx.x * sizeof(Word); i < to; i += kThreads * sizeof(Word)) {
    const Word word = *reinterpret_cast<const Word*>(source + i);
    for (int t = 0; t < sender.targets; ++t) {
      *reinterpret_cast<Word*>(sender.target[t] + start + i) = word;
    }
  }
}

// The bytes [from, to) of a piece; `from` is a multiple of kTile. Slots are aligned, sources may
// not.
__device__ void copy_part(const SenderDevice& sender, const Piece& piece, int slot,
                          std::uint64_t from, std::uint64_t to) {
  const std::uint64_t start = sender.slot_nbytes * slot + piece.offset;
  const auto address = reinterpret_cast<std::uintptr_t>(piece.source);
  std::uint64_t middle = from;
  if (address % sizeof(uint4) == 0) {
    middle = to / sizeof(uint4) * sizeof(uint4);
    copy_words<uint4>(sender, piece.source, start, from, middle);
  } else if (address % sizeof(std::uint32_t) == 0) {
    middle = to / sizeof(std::uint32_t) * sizeof(std::uint32_t);
    copy_words<std::uint32_t>(sender, piece.source, start, from, middle);
  }
  copy_words<std::uint8_t>(sender, piece.source, start, middle, to);
}

__global__ void __launch_bounds__(kThreads)
    put_kernel(SenderDevice sender, const __grid_constant__ Bundle bundle, int slot) {
  SenderCounters& counters = *sender.counters;
  // All blocks read it before the last of them, which is the one that changes it, is done.
  const std::uint64_t epoch = counters.begun + 1;
  __shared__ bool go;
  if (threadIdx.x < kWarp) {
    bool good = true;
    if (threadIdx.x == 0) {
      good = in_turn(sender.guard, Operation::kBegin, slot, epoch - 1,
                     counters.begun == counters.committed, sender.slots);
    }
    good = everywhere(good) && wait_for_credits(sender, epoch, slot);
    if (threadIdx.x == 0) go = good;
  }
  __syncthreads();
  if (!go) return;  // aborted: nothing counts until the next reset

  // Tiles of all pieces are dealt out to the blocks in turn.
  std::uint64_t tile = 0;
  for (int p = 0; p < bundle.count; ++p) {
    const Piece& piece = bundle.pieces[p];
    for (std::uint64_t from = 0; from < piece.nbytes; from += kTile, ++tile) {
      if (tile % gridDim.x != blockIdx.x) continue;
      const std::uint64_t to = from + kTile < piece.nbytes ? from + kTile : piece.nbytes;
      copy_part(sender, piece, slot, from, to);
    }
  }
  // Data before flag: the barrier orders the block's stores before what thread 0 releases.
  __syncthreads();
  if (threadIdx.x < sender.receivers) {
    std::uint64_t* first = sender.arrived[threadIdx.x];
    ptx::store_release_system(first + blockIdx.x * kFlagStride, epoch);
  }
  if (threadIdx.x == 0 && atomicAdd(&counters.finished, 1) + 1 == gridDim.x) {
    counters.finished = 0;
    counters.begun = epoch;
    counters.committed = epoch;
  }
}

__global__ void fill_kernel(std::uint32_t* memory, std::uint32_t count, std::uint32_t seed) {
  for (std::uint32_t i = threadIdx.x; i < count; i += blockDim.x) memory[i] = seed + i;
}

}  // namespace

void launch_begin(const SenderDevice& sender, int slot, cudaStream_t stream) {
  begin_kernel<<<1, kWarp, 0, stream>>>(sender, slot);
  check_cuda(cudaGetLastError(), "launching begin");
}

void launch_commit(const SenderDevice& sender, int slot, cudaStream_t stream) {
  commit_kernel<<<1, kWarp, 0, stream>>>(sender, slot);
  check_cuda(cudaGetLastError(), "launching commit");
}

void launch_get(const ReceiverDevice& receiver, int slot, cudaStream_t stream) {
  get_kernel<<<1, kWarp, 0, stream>>>(receiver, slot);
  check_cuda(cudaGetLastError(), "launching get");
}

void launch_release(const ReceiverDevice& receiver, int slot, cudaStream_t stream) {
  release_kernel<<<1, kWarp, 0, stream>>>(receiver, slot);
  check_cuda(cudaGetLastError(), "launching release");
}

void launch_put(const SenderDevice& sender, const Bundle& bundle, int slot, cudaStream_t stream) {
  put_kernel<<<static_cast<unsigned>(sender.flags), kThreads, 0, stream>>>(sender, bundle, slot);
  check_cuda(cudaGetLastError(), "launching put");
}

void launch_fill(std::uint32_t* memory, std::uint32_t count, std::uint32_t seed,
                 cudaStream_t stream) {
  fill_kernel<<<1, 256, 0, stream>>>(memory, count, seed);
  check_cuda(cudaGetLastError(), "launching fill");
}

void preload_kernels() {
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, begin_kernel), "loading kernels");
  check_cuda(cudaFuncGetAttributes(&attributes, commit_kernel), "loading kernels");
  check_cuda(cudaFuncGetAttributes(&attributes, get_kernel), "loading kernels");
  check_cuda(cudaFuncGetAttributes(&attributes, release_kernel), "loading kernels");
  check_cuda(cudaFuncGetAttributes(&attributes, put_kernel), "loading kernels");
  check_cuda(cudaFuncGetAttributes(&attributes, fill_kernel), "loading kernels");
}

}  // namespace asyncdiff
