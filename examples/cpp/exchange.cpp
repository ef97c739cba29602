// Two ranks exchange a bundle of two tensors: threads on the host, then GPUs where there are some.
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "asyncdiff/errors.hpp"
#include "asyncdiff/host_fabric.hpp"
#ifdef ASYNCDIFF_WITH_CUDA
#include <cuda_runtime_api.h>

#include "asyncdiff/cuda_fabric.hpp"
#endif

using namespace asyncdiff;

namespace {

constexpr double kDeadline = 10.0;
constexpr int kSlots = 2;
constexpr int kBundles = 10;

Layout make_layout() {
  return Layout({TensorSpec("float32", {2, 320, 8, 8}), TensorSpec("int64", {7})});
}

void on_the_host() {
  HostFabric fabric(2, kDeadline);
  const Layout layout = make_layout();
  const auto channel = fabric.channel(0, {1}, layout, kSlots, "example");

  std::thread sender([&] {
    std::vector<float> hidden(layout.specs[0].nbytes / sizeof(float));
    std::vector<std::int64_t> numbers(7);
    for (int n = 0; n < kBundles; ++n) {
      hidden.assign(hidden.size(), static_cast<float>(n));
      numbers.assign(7, n);
      channel->begin(n % kSlots, 0);  // waits until the slot is free
      channel->push(0, hidden.data(), n % kSlots, 0);
      channel->push(1, numbers.data(), n % kSlots, 0);
      channel->commit(n % kSlots, 0);
    }
  });
  for (int n = 0; n < kBundles; ++n) {
    channel->get(1, n % kSlots, 0);  // waits until the bundle is there
    float first = 0;
    std::memcpy(&first, channel->slot(1, n % kSlots).data, sizeof first);
    channel->release(1, n % kSlots, 0);
    if (first != static_cast<float>(n)) throw Error("a bundle came out of order");
  }
  sender.join();
  std::printf("host: %d bundles of %zu bytes\n", kBundles, layout.nbytes);
}

#ifdef ASYNCDIFF_WITH_CUDA
void check(cudaError_t code) {
  if (code != cudaSuccess) throw CudaError(cudaGetErrorString(code));
}

// Both ranks are driven by one thread here: every call only enqueues on its rank's stream.
void on_gpus() {
  const int count = cuda_device_count();
  if (count == 0) {
    std::printf("no GPU\n");
    return;
  }
  const std::vector<int> devices = {0, count > 1 ? 1 : 0};
  CudaFabric fabric(devices, kDeadline, Transport::kAuto);
  const Layout layout = make_layout();
  const auto channel = fabric.channel(0, {1}, layout, kSlots, "example");

  cudaStream_t streams[2];
  for (int rank : {0, 1}) {
    check(cudaSetDevice(devices[static_cast<std::size_t>(rank)]));
    check(cudaStreamCreateWithFlags(&streams[rank], cudaStreamNonBlocking));
  }
  const auto sending = reinterpret_cast<Stream>(streams[0]);
  const auto receiving = reinterpret_cast<Stream>(streams[1]);

  check(cudaSetDevice(devices[0]));
  void* memory = nullptr;
  check(cudaMalloc(&memory, layout.nbytes));
  auto* source = static_cast<std::byte*>(memory);
  for (int n = 0; n < kBundles; ++n) {
    const int slot = n % kSlots;
    check(cudaMemsetAsync(source, n, layout.nbytes, streams[0]));
    channel->begin(slot, sending);
    for (std::size_t i = 0; i < layout.specs.size(); ++i) {
      channel->push(i, source + layout.offsets[i], slot, sending);
    }
    channel->commit(slot, sending);

    channel->get(1, slot, receiving);
    unsigned char first = 0;
    check(cudaMemcpyAsync(&first, channel->slot(1, slot).data, 1, cudaMemcpyDeviceToHost,
                          streams[1]));
    channel->release(1, slot, receiving);
    check(cudaStreamSynchronize(streams[1]));
    fabric.check();  // throws what went wrong on a device
    if (first != n) throw Error("a bundle came out of order");
  }
  check(cudaFree(memory));
  std::printf("CUDA devices %d and %d (%s): %d bundles\n", devices[0], devices[1],
              fabric.links().at({0, 1}).c_str(), kBundles);
}
#endif

}  // namespace

int main() {
  try {
    on_the_host();
#ifdef ASYNCDIFF_WITH_CUDA
    on_gpus();
#endif
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
