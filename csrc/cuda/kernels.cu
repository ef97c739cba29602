// The signal kernels: wait for an epoch, publish an epoch. Data moves by copy engines before them.
#include "check.hpp"
#include "kernels.hpp"
#include "ptx.cuh"

namespace asyncdiff {

namespace {

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

__global__ void begin_kernel(SenderDevice sender, int slot) {
  SenderCounters& counters = *sender.counters;
  const std::uint64_t slots = static_cast<std::uint64_t>(sender.slots);
  if (!in_turn(sender.guard, Operation::kBegin, slot, counters.begun,
               counters.begun == counters.committed, sender.slots)) {
    return;
  }
  const std::uint64_t epoch = ++counters.begun;
  const std::uint64_t needed = epoch > slots ? epoch - slots : 0;
  for (int i = 0; i < sender.receivers; ++i) {
    if (!wait_for(sender.guard, sender.credits[i], needed, Operation::kBegin, slot,
                  sender.ranks[i])) {
      return;
    }
  }
}

__global__ void commit_kernel(SenderDevice sender, int slot) {
  SenderCounters& counters = *sender.counters;
  if (!in_turn(sender.guard, Operation::kCommit, slot, counters.committed,
               counters.committed < counters.begun, sender.slots)) {
    return;
  }
  const std::uint64_t epoch = ++counters.committed;
  for (int i = 0; i < sender.receivers; ++i) ptx::store_release_system(sender.arrived[i], epoch);
}

__global__ void get_kernel(ReceiverDevice receiver, int slot) {
  ReceiverCounters& counters = *receiver.counters;
  if (!in_turn(receiver.guard, Operation::kGet, slot, counters.got, true, receiver.slots)) return;
  wait_for(receiver.guard, receiver.arrived, ++counters.got, Operation::kGet, slot,
           receiver.sender_rank);
}

__global__ void release_kernel(ReceiverDevice receiver, int slot) {
  ReceiverCounters& counters = *receiver.counters;
  if (!in_turn(receiver.guard, Operation::kRelease, slot, counters.released,
               counters.released < counters.got, receiver.slots)) {
    return;
  }
  ptx::store_release_system(receiver.credit, ++counters.released);
}

__global__ void fill_kernel(std::uint32_t* memory, std::uint32_t count, std::uint32_t seed) {
  for (std::uint32_t i = threadIdx.x; i < count; i += blockDim.x) memory[i] = seed + i;
}

}  // namespace

void launch_begin(const SenderDevice& sender, int slot, cudaStream_t stream) {
  begin_kernel<<<1, 1, 0, stream>>>(sender, slot);
  check_cuda(cudaGetLastError(), "launching begin");
}

void launch_commit(const SenderDevice& sender, int slot, cudaStream_t stream) {
  commit_kernel<<<1, 1, 0, stream>>>(sender, slot);
  check_cuda(cudaGetLastError(), "launching commit");
}

void launch_get(const ReceiverDevice& receiver, int slot, cudaStream_t stream) {
  get_kernel<<<1, 1, 0, stream>>>(receiver, slot);
  check_cuda(cudaGetLastError(), "launching get");
}

void launch_release(const ReceiverDevice& receiver, int slot, cudaStream_t stream) {
  release_kernel<<<1, 1, 0, stream>>>(receiver, slot);
  check_cuda(cudaGetLastError(), "launching release");
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
  check_cuda(cudaFuncGetAttributes(&attributes, fill_kernel), "loading kernels");
}

}  // namespace asyncdiff
