// A kernel that consumes bundles itself: it waits for one, adds it to a sum, and gives the slot
// back, in one launch, in place of get, a kernel and release. Both ranks may be on one GPU.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <vector>

#include "asyncdiff/channel_receiver.hpp"
#include "asyncdiff/cuda_fabric.hpp"
#include "asyncdiff/errors.hpp"

using namespace asyncdiff;

namespace {

constexpr double kDeadline = 10.0;
constexpr int kSlots = 2;
constexpr int kBundles = 10;
constexpr int kElements = 100'000;

void check(cudaError_t code) {
  if (code != cudaSuccess) throw CudaError(cudaGetErrorString(code));
}

__global__ void fill(float* values, float value) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < kElements) values[i] = value;
}

__global__ void add_bundle(ReceiverDevice from, int slot, float* sum) {
  __shared__ BundleState bundle;
  if (!start(from, slot, true, bundle)) return;
  bool good = true;
  if (static_cast<int>(threadIdx.x) < from.flags) {
    good = wait_for_flag(from, slot, bundle.epoch, static_cast<int>(threadIdx.x));
  }
  if (__syncthreads_and(good) == 0) return;  // aborted or too late: Fabric::check() says why
  const auto* values = reinterpret_cast<const float*>(from.source + from.slot_nbytes * slot);
  const int step = static_cast<int>(gridDim.x * blockDim.x);
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < kElements; i += step) {
    sum[i] += values[i];
  }
  finish(from, true, bundle);
}

void run(Mode mode) {
  const int other = cuda_device_count() > 1 ? 1 : 0;
  CudaFabric fabric({0, other}, kDeadline, Transport::kAuto);
  const Layout layout({TensorSpec("float32", {kElements})});
  const auto channel = fabric.channel(0, {1}, layout, kSlots, "fused get", mode);
  const ReceiverDevice receiver = fabric.receiver_device(*channel, 1);

  cudaStream_t sending, receiving;
  float *values, *sum;
  check(cudaSetDevice(0));
  check(cudaStreamCreateWithFlags(&sending, cudaStreamNonBlocking));
  check(cudaMalloc(&values, layout.nbytes));
  check(cudaSetDevice(other));
  check(cudaStreamCreateWithFlags(&receiving, cudaStreamNonBlocking));
  check(cudaMalloc(&sum, layout.nbytes));
  check(cudaMemset(sum, 0, layout.nbytes));
  check(cudaDeviceSynchronize());
  // Load the kernel before anything waits: one that is first loaded meanwhile may never arrive.
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, add_bundle));

  for (int n = 0; n < kBundles; ++n) {
    check(cudaSetDevice(0));
    fill<<<(kElements + 255) / 256, 256, 0, sending>>>(values, static_cast<float>(n + 1));
    check(cudaGetLastError());
    channel->put({values}, n % kSlots, reinterpret_cast<Stream>(sending));
    check(cudaSetDevice(other));
    add_bundle<<<8, 256, 0, receiving>>>(receiver, n % kSlots, sum);
    check(cudaGetLastError());
  }
  check(cudaStreamSynchronize(receiving));
  fabric.check();
  std::vector<float> result(kElements);
  // Not layout.nbytes: bundles are padded.
  check(cudaMemcpy(result.data(), sum, kElements * sizeof(float), cudaMemcpyDeviceToHost));
  for (const float r : result) {
    if (r != kBundles * (kBundles + 1) / 2) throw Error("a sum is wrong");
  }
  std::printf("fused get (%s): %d bundles of %zu bytes\n", name_of(channel->mode()).c_str(),
              kBundles, layout.nbytes);
  check(cudaFree(sum));
  check(cudaSetDevice(0));
  check(cudaFree(values));
}

}  // namespace

int main() {
  try {
    if (cuda_device_count() == 0) {
      std::printf("no GPU\n");
      return 0;
    }
    run(Mode::kKernel);
    run(Mode::kCopy);
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
