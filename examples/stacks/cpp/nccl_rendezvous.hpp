// The rendezvous of asyncdiff over a communicator of NCCL that the caller has already: bytes are
// gathered by ncclAllGather, through memory of the GPU.
#pragma once

#include <cuda_runtime_api.h>
#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/rendezvous.hpp"

inline void check(cudaError_t code) {
  if (code != cudaSuccess) throw asyncdiff::CudaError(cudaGetErrorString(code));
}

inline void check(ncclResult_t code) {
  if (code != ncclSuccess && code != ncclInProgress) {
    throw asyncdiff::NcclError(ncclGetErrorString(code));
  }
}

class NcclRendezvous final : public asyncdiff::Rendezvous {
 public:
  // The communicator is the caller's, and outlives this; the current device is the communicator's.
  // `seconds`: how long to wait for the other processes in each call.
  NcclRendezvous(ncclComm_t communicator, double seconds) : all_(communicator), seconds_(seconds) {
    check(ncclCommUserRank(all_, &process_));
    check(ncclCommCount(all_, &processes_));
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  NcclRendezvous(const NcclRendezvous&) = delete;
  NcclRendezvous& operator=(const NcclRendezvous&) = delete;
  ~NcclRendezvous() override { cudaStreamDestroy(stream_); }

  int process() const override { return process_; }
  int processes() const override { return processes_; }

  // NCCL gathers equally many bytes of each: first the sizes, then as many as the longest has.
  std::vector<std::string> all_gather(const std::string& mine) override {
    const std::uint64_t size = mine.size();
    const std::string sizes = gather({reinterpret_cast<const char*>(&size), sizeof size});
    std::vector<std::uint64_t> of(static_cast<std::size_t>(processes_));
    std::memcpy(of.data(), sizes.data(), sizes.size());
    const std::uint64_t longest =
        std::max<std::uint64_t>(1, *std::max_element(of.begin(), of.end()));
    std::string padded = mine;
    padded.resize(longest);
    const std::string bytes = gather(padded);
    std::vector<std::string> out;
    for (std::size_t p = 0; p < of.size(); ++p) out.push_back(bytes.substr(p * longest, of[p]));
    return out;
  }

 private:
  // Everybody's bytes, one after the other.
  std::string gather(const std::string& mine) {
    std::string all(mine.size() * static_cast<std::size_t>(processes_), 0);
    void* memory = nullptr;
    check(cudaMalloc(&memory, mine.size() + all.size()));
    auto* received = static_cast<std::byte*>(memory) + mine.size();
    check(cudaMemcpyAsync(memory, mine.data(), mine.size(), cudaMemcpyHostToDevice, stream_));
    check(ncclAllGather(memory, received, mine.size(), ncclChar, all_, stream_));
    check(cudaMemcpyAsync(all.data(), received, all.size(), cudaMemcpyDeviceToHost, stream_));
    wait();
    check(cudaFree(memory));
    return all;
  }

  // No wait is unbounded. After an error the communicator is the caller's to abort
  // (ncclCommAbort), which ends what is still in the stream; its memory is given up then.
  void wait() {
    const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds_);
    while (true) {
      const cudaError_t done = cudaStreamQuery(stream_);
      if (done == cudaSuccess) return;
      if (done != cudaErrorNotReady) check(done);
      ncclResult_t state = ncclSuccess;
      check(ncclCommGetAsyncError(all_, &state));
      check(state);
      if (std::chrono::steady_clock::now() > until) {
        throw asyncdiff::NcclError("a process of the communicator did not come in time");
      }
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

  ncclComm_t all_;
  double seconds_;
  int process_ = 0;
  int processes_ = 0;
  cudaStream_t stream_ = nullptr;
};
