// What the network of GPUs calls of CUDA, in host memory: one device, and kernels that the caller
// runs to their end, as those of signals.cuh, put.cuh and nccl_signals.cuh do it.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>

#include "../../cuda/kernels.hpp"
#include "../../cuda/nccl_ends.hpp"
#include "memory_on_cpu.hpp"
#include "stream_on_cpu.hpp"

bool on_cpu::memory_is_full = false;

namespace {

on_cpu::Stream* as_stream(cudaStream_t stream) { return reinterpret_cast<on_cpu::Stream*>(stream); }

// The one device has a context, which is always current: what asks for it changes nothing.
CUresult current_context(CUcontext* context) {
  static int place;
  *context = reinterpret_cast<CUcontext>(&place);
  return CUDA_SUCCESS;
}
CUresult make_current(CUcontext) { return CUDA_SUCCESS; }

cudaError_t of_driver(const char* name, void** function) {
  if (std::strcmp(name, "cuCtxGetCurrent") == 0) {
    *function = reinterpret_cast<void*>(&current_context);
  } else if (std::strcmp(name, "cuCtxSetCurrent") == 0) {
    *function = reinterpret_cast<void*>(&make_current);
  } else {
    return cudaErrorNotSupported;
  }
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "an error"; }
const char* cudaGetErrorString(cudaError_t) { return "of CUDA"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -1;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = reinterpret_cast<cudaStream_t>(new on_cpu::Stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int) {
  return cudaStreamCreateWithFlags(stream, flags);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete as_stream(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  as_stream(stream)->synchronize();
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaMalloc(void** memory, std::size_t nbytes) {
  if (on_cpu::memory_is_full) return cudaErrorMemoryAllocation;
  *memory = std::aligned_alloc(256, (nbytes + 255) / 256 * 256);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, std::size_t nbytes, unsigned) {
  return cudaMalloc(memory, nbytes);
}
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
cudaError_t cudaHostRegister(void*, std::size_t, unsigned) { return cudaSuccess; }
cudaError_t cudaHostUnregister(void*) { return cudaSuccess; }
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, std::size_t nbytes, cudaMemcpyKind) {
  std::memcpy(to, from, nbytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t nbytes, cudaStream_t) {
  std::memset(memory, value, nbytes);
  return cudaSuccess;
}
#if CUDART_VERSION >= 12050
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult*) {
  return of_driver(name, function);
}
#else
cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult*) {
  return of_driver(name, function);
}
#endif
}

namespace asyncdiff {

int cuda_device_count() { return 1; }
void preload_kernels() {}

namespace {

void fail(const WaitContext& context, FailureKind kind, Operation operation, int slot,
          std::uint64_t expected, std::uint64_t seen, int peer) {
  FailureRecord& record = *context.record;
  record.operation = static_cast<std::uint64_t>(operation);
  record.slot = static_cast<std::uint64_t>(slot);
  record.expected = expected;
  record.seen = seen;
  record.peer = peer;
  record.time =
      static_cast<std::uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
  store_word(&record.kind, static_cast<std::uint64_t>(kind));
  store_word(context.abort, 1);
}

bool in_turn(const WaitContext& context, Operation operation, int slot, std::uint64_t done,
             bool allowed, int slots) {
  const std::uint64_t next = done % static_cast<std::uint64_t>(slots);
  if (allowed && next == static_cast<std::uint64_t>(slot)) return true;
  if (load_word(context.abort) == 0) {
    fail(context, allowed ? FailureKind::kSlotOrder : FailureKind::kCallOrder, operation, slot,
         next, done, -1);
  }
  return false;
}

bool wait_for(const WaitContext& context, const std::uint64_t* word, std::uint64_t needed,
              Operation operation, int slot, int peer) {
  const auto limit =
      std::chrono::steady_clock::now() + std::chrono::nanoseconds(context.deadline_ns);
  while (!reached(load_word(word), needed)) {
    if (load_word(context.abort) != 0) return false;
    if (std::chrono::steady_clock::now() > limit) {
      fail(context, FailureKind::kTimeout, operation, slot, needed, load_word(word), peer);
      return false;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  return true;
}

}  // namespace

void launch_begin(const SenderDevice& sender, int slot, cudaStream_t) {
  SenderCounters& counters = *sender.counters;
  const std::uint64_t done = counters.begun;
  if (!in_turn(sender.context, Operation::kBegin, slot, done, done == counters.committed,
               sender.slots)) {
    return;
  }
  const std::uint64_t needed = done + 1 - static_cast<std::uint64_t>(sender.slots);
  if (wait_for(sender.context, sender.credits[0], needed, Operation::kBegin, slot,
               sender.ranks[0])) {
    counters.begun = done + 1;
  }
}

void launch_push(const SenderDevice& sender, const Piece& piece, int slot, cudaStream_t) {
  const SenderCounters& counters = *sender.counters;
  if (!in_turn(sender.context, Operation::kPush, slot, counters.committed,
               counters.begun == counters.committed + 1, sender.slots)) {
    return;
  }
  std::memcpy(
      sender.target[0] + sender.slot_nbytes * static_cast<std::uint64_t>(slot) + piece.offset,
      piece.memory, piece.nbytes);
}

void launch_pushed(const SenderDevice& sender, int, std::uint64_t* word, cudaStream_t) {
  if (sender.counters->begun == sender.counters->committed + 1) {
    store_word(word, sender.counters->begun);
  }
}

void launch_commit(const SenderDevice& sender, int slot, cudaStream_t) {
  SenderCounters& counters = *sender.counters;
  const std::uint64_t epoch = counters.committed + 1;
  if (!in_turn(sender.context, Operation::kCommit, slot, epoch - 1, counters.begun == epoch,
               sender.slots)) {
    return;
  }
  counters.committed = epoch;
  for (int i = 0; i < sender.flags; ++i) store_word(sender.arrived[0] + i * kFlagStride, epoch);
}

namespace {

template <class P>
void put_all(const P& puts) {
  launch_begin(puts.sender[0], puts.slot[0], nullptr);
  for (int i = puts.first_piece[0]; i < puts.first_piece[1]; ++i) {
    launch_push(puts.sender[0], puts.pieces[i], puts.slot[0], nullptr);
  }
  launch_commit(puts.sender[0], puts.slot[0], nullptr);
}

}  // namespace

void launch_put(const SmallPut& put, Launch, cudaStream_t) { put_all(put); }
void launch_put(const OnePut& put, Launch, cudaStream_t) { put_all(put); }
void launch_put(const ManyPuts& put, Launch, cudaStream_t) { put_all(put); }

void launch_get(const ReceiverDevice& receiver, int slot, Launch, cudaStream_t) {
  ReceiverCounters& counters = *receiver.counters;
  const std::uint64_t done = counters.got;
  if (in_turn(receiver.context, Operation::kGet, slot, done, true, receiver.slots) &&
      wait_for(receiver.context, receiver.arrived, done + 1, Operation::kGet, slot,
               receiver.sender_rank)) {
    counters.got = done + 1;
  }
}

void launch_release(const ReceiverDevice& receiver, int slot, Launch, cudaStream_t) {
  ReceiverCounters& counters = *receiver.counters;
  if (in_turn(receiver.context, Operation::kRelease, slot, counters.released,
              counters.released != counters.got, receiver.slots)) {
    store_word(receiver.credit, ++counters.released);
  }
}

void launch_publish(const Publication& what, cudaStream_t stream) {
  as_stream(stream)->enqueue([what] {
    if (what.device != nullptr) store_word(what.device, what.bundle);
    store_word(what.host, what.message);
  });
}

}  // namespace asyncdiff
