#include "cuda_memory.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "asyncdiff/shared_memory.hpp"
#include "check.hpp"
#include "device_guard.hpp"

namespace asyncdiff {

Buffer allocate_device(int device, std::size_t nbytes) {
  const DeviceGuard guard(device);
  void* memory = nullptr;
  const std::string what =
      "allocating " + std::to_string(nbytes) + " bytes on CUDA device " + std::to_string(device);
  check_cuda(cudaMalloc(&memory, std::max<std::size_t>(nbytes, 1)), what.c_str());
  std::shared_ptr<void> owner(memory,
                              [device](void* p) { quietly_on(device, [p] { cudaFree(p); }); });
  Buffer out{std::move(owner), static_cast<std::byte*>(memory), nbytes, device};
  clear(out, nbytes);
  return out;
}

Buffer allocate_pinned(int device, std::size_t nbytes) {
  const DeviceGuard guard(device);
  void* memory = nullptr;
  const std::size_t size = std::max<std::size_t>(nbytes, 1);
  const std::string what = "allocating " + std::to_string(size) + " bytes of pinned host memory";
  check_cuda(cudaHostAlloc(&memory, size, cudaHostAllocPortable | cudaHostAllocMapped),
             what.c_str());
  std::shared_ptr<void> owner(memory,
                              [device](void* p) { quietly_on(device, [p] { cudaFreeHost(p); }); });
  std::memset(memory, 0, size);
  return {std::move(owner), static_cast<std::byte*>(memory), nbytes, Buffer::kHost};
}

Buffer share_pinned(const Party& party, int creator, int device, std::size_t nbytes) {
  if (!party.several()) return allocate_pinned(device, nbytes);
  constexpr std::size_t kPage = 4096;
  const std::size_t size = (std::max<std::size_t>(nbytes, 1) + kPage - 1) / kPage * kPage;
  const Buffer shared = share(party, creator, size);
  Buffer out;
  party.together("pin shared memory", [&] {
    const DeviceGuard guard(device);
    check_cuda(
        cudaHostRegister(shared.data, size, cudaHostRegisterPortable | cudaHostRegisterMapped),
        "pinning shared memory");
    std::shared_ptr<void> owner(shared.data, [shared, device](void* p) {
      quietly_on(device, [p] { cudaHostUnregister(p); });
    });
    void* seen = nullptr;
    check_cuda(cudaHostGetDevicePointer(&seen, shared.data, 0), "mapping shared memory");
    if (seen != shared.data) throw DeviceError("devices see host memory at another address here");
    out = {std::move(owner), shared.data, nbytes, Buffer::kHost};
  });
  return out;
}

void clear(const Buffer& buffer, std::size_t nbytes, unsigned char value) {
  if (nbytes == 0) return;
  if (buffer.device == Buffer::kHost) {
    std::memset(buffer.data, value, nbytes);
    return;
  }
  const DeviceGuard guard(buffer.device);
  // A stream of its own: the default stream would wait for, and hold up, unrelated work.
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  cudaError_t code = cudaMemsetAsync(buffer.data, value, nbytes, stream);
  if (code == cudaSuccess) code = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  check_cuda(code, "clearing device memory");
}

}  // namespace asyncdiff
