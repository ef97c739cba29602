// Processes with a GPU each, and a communicator of NCCL, exchange bundles between their GPUs. The
// communicator is made here over a store, as stacks make theirs; a caller has one already.
//
//   RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29400 ./over_nccl   (and RANK=1)
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "asyncdiff/cuda_fabric.hpp"
#include "key_value_store.hpp"
#include "nccl_rendezvous.hpp"

namespace {

constexpr double kDeadline = 30.0;
constexpr int kSlots = 2;
constexpr int kBundles = 100;

std::string said(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) throw std::runtime_error(std::string(name) + " is not set");
  return value;
}

ncclComm_t communicator(KeyValueStore& store, int rank, int ranks) {
  ncclUniqueId id;
  if (rank == 0) {
    check(ncclGetUniqueId(&id));
    store.set("nccl", std::string(id.internal, sizeof id.internal));
  }
  store.get("nccl").copy(id.internal, sizeof id.internal);
  ncclComm_t made = nullptr;
  check(ncclCommInitRank(&made, ranks, id, rank));
  return made;
}

// From process 0's GPU to that of process 1.
void exchange(asyncdiff::Fabric& fabric, int rank) {
  const asyncdiff::Layout layout({asyncdiff::TensorSpec("uint8", {1 << 20})});
  const auto channel = fabric.channel(0, {1}, layout, kSlots, "pictures");
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto ours = reinterpret_cast<asyncdiff::Stream>(stream);
  void* memory = nullptr;
  check(cudaMalloc(&memory, layout.nbytes));
  std::vector<unsigned char> got(layout.nbytes);
  for (int n = 0; n < kBundles; ++n) {
    if (rank == 0) {
      check(cudaMemsetAsync(memory, n, layout.nbytes, stream));
      channel->put({memory}, n % kSlots, ours);
    } else if (rank == 1) {
      channel->get(1, n % kSlots, ours);
      check(cudaMemcpyAsync(got.data(), channel->slot(1, n % kSlots).data, got.size(),
                            cudaMemcpyDeviceToHost, stream));
      channel->release(1, n % kSlots, ours);
    }
    check(cudaStreamSynchronize(stream));
    fabric.check();  // throws what went wrong on a device
    if (rank != 1) continue;
    for (unsigned char byte : got) {
      if (byte != n) throw std::runtime_error("a wrong bundle");
    }
  }
  check(cudaFree(memory));
  check(cudaStreamDestroy(stream));
  channel->close();
}

}  // namespace

int main() {
  try {
    const int rank = std::stoi(said("RANK")), ranks = std::stoi(said("WORLD_SIZE"));
    int count = 0;
    check(cudaGetDeviceCount(&count));
    if (count < ranks) throw std::runtime_error("needs a GPU for each process");
    check(cudaSetDevice(rank));
    KeyValueStore store(said("MASTER_ADDR"), std::stoi(said("MASTER_PORT")), rank == 0, kDeadline);
    ncclComm_t all = communicator(store, rank, ranks);

    // Rank r is process r, on its GPU r.
    std::vector<int> ours;
    for (int r = 0; r < ranks; ++r) ours.push_back(r);
    {
      // The communicator is used while the fabric is made, and never again.
      auto meeting = std::make_shared<NcclRendezvous>(all, kDeadline);
      const auto fabric =
          asyncdiff::make_cuda_fabric(ours, ours, kDeadline, asyncdiff::Transport::kAuto, meeting);
      exchange(*fabric, rank);
      fabric->all_gather("done", kDeadline);
      fabric->close();
    }
    check(ncclCommDestroy(all));
    if (rank == 1) std::printf("%d bundles of 1 MiB between GPUs\n", kBundles);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
