#include "cuda_memory.hpp"

#include <algorithm>
#include <cstring>
#include <string>

#include "check.hpp"

namespace asyncdiff {

Buffer allocate_device(int device, std::size_t nbytes) {
  const DeviceGuard guard(device);
  void* memory = nullptr;
  const std::string what =
      "allocating " + std::to_string(nbytes) + " bytes on CUDA device " + std::to_string(device);
  check_cuda(cudaMalloc(&memory, std::max<std::size_t>(nbytes, 1)), what.c_str());
  // Errors are of no use in a destructor, least of all when the process ends.
  std::shared_ptr<void> owner(memory, [device](void* p) {
    int previous = 0;
    if (cudaGetDevice(&previous) != cudaSuccess) return;
    cudaSetDevice(device);
    cudaFree(p);
    cudaSetDevice(previous);
  });
  Buffer out{std::move(owner), static_cast<std::byte*>(memory), nbytes, device};
  clear(out);
  return out;
}

Buffer allocate_pinned(std::size_t nbytes) {
  void* memory = nullptr;
  const std::size_t size = std::max<std::size_t>(nbytes, 1);
  const std::string what = "allocating " + std::to_string(size) + " bytes of pinned host memory";
  check_cuda(cudaHostAlloc(&memory, size, cudaHostAllocPortable | cudaHostAllocMapped),
             what.c_str());
  std::shared_ptr<void> owner(memory, [](void* p) { cudaFreeHost(p); });
  std::memset(memory, 0, size);
  return {std::move(owner), static_cast<std::byte*>(memory), nbytes, Buffer::kHost};
}

void clear(const Buffer& buffer) {
  if (buffer.nbytes == 0) return;
  if (buffer.device == Buffer::kHost) {
    std::memset(buffer.data, 0, buffer.nbytes);
    return;
  }
  const DeviceGuard guard(buffer.device);
  // A stream of its own: the default stream would wait for, and hold up, unrelated work.
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  cudaError_t code = cudaMemsetAsync(buffer.data, 0, buffer.nbytes, stream);
  if (code == cudaSuccess) code = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  check_cuda(code, "clearing device memory");
}

void* ControlLines::take(int device, std::size_t count) {
  Place& place = places_[device];
  if (place.used + count > kLinesPerChunk) {
    constexpr std::size_t kBytes = kLine * kLinesPerChunk;
    place.chunks.push_back(device == Buffer::kHost ? allocate_pinned(kBytes)
                                                   : allocate_device(device, kBytes));
    place.used = 0;
  }
  void* first = place.chunks.back().data + kLine * place.used;
  place.used += count;
  return first;
}

void ControlLines::clear_all() {
  for (const auto& [device, place] : places_) {
    for (const Buffer& chunk : place.chunks) clear(chunk);
  }
}

void ControlLines::release_all() { places_.clear(); }

}  // namespace asyncdiff
