#include "ipc.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "asyncdiff/cuda_fabric.hpp"
#include "check.hpp"
#include "cuda_memory.hpp"
#include "device_guard.hpp"

namespace asyncdiff {

namespace {

struct Handle {
  static constexpr char kMagic[8] = {'a', 's', 'y', 'n', 'c', 'c', 'u', 'd'};
  static constexpr std::uint32_t kVersion = 1;

  char magic[8];
  std::uint32_t version;
  std::uint32_t reserved;
  std::uint64_t nbytes;
  cudaIpcMemHandle_t memory;
};

}  // namespace

const std::size_t kDeviceHandleBytes = sizeof(Handle);

Buffer allocate_exportable(int device, std::size_t nbytes) {
  constexpr std::size_t kBlock = std::size_t{2} << 20;
  Buffer out =
      allocate_device(device, (std::max<std::size_t>(nbytes, 1) + kBlock - 1) / kBlock * kBlock);
  out.nbytes = nbytes;
  return out;
}

std::string export_device(const Buffer& buffer) {
  const DeviceGuard guard(buffer.device);
  Handle handle{};
  std::memcpy(handle.magic, Handle::kMagic, sizeof handle.magic);
  handle.version = Handle::kVersion;
  handle.nbytes = buffer.nbytes;
  check_cuda(cudaIpcGetMemHandle(&handle.memory, buffer.data), "exporting device memory");
  return std::string(reinterpret_cast<const char*>(&handle), sizeof handle);
}

Buffer import_device(const std::string& bytes, int device, std::size_t nbytes) {
  Handle handle;
  if (bytes.size() != sizeof handle ||
      std::memcmp(bytes.data(), Handle::kMagic, sizeof handle.magic) != 0) {
    throw InvalidArgument("these bytes are no device memory handle");
  }
  std::memcpy(&handle, bytes.data(), sizeof handle);
  if (handle.version != Handle::kVersion || handle.nbytes != nbytes) {
    throw InvalidArgument("the device memory handle is of version " +
                          std::to_string(handle.version) + " and " + std::to_string(handle.nbytes) +
                          " bytes, expected are version " + std::to_string(Handle::kVersion) +
                          " and " + std::to_string(nbytes) +
                          ": all processes need the same asyncdiff and the same channels in order");
  }
  const DeviceGuard guard(device);
  void* memory = nullptr;
  check_cuda(cudaIpcOpenMemHandle(&memory, handle.memory, cudaIpcMemLazyEnablePeerAccess),
             "opening device memory of another process");
  std::shared_ptr<void> owner(
      memory, [device](void* p) { quietly_on(device, [p] { cudaIpcCloseMemHandle(p); }); });
  return {std::move(owner), static_cast<std::byte*>(memory), nbytes, device};
}

std::string uuid_of(int device) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, device), "asking for a device's properties");
  return std::string(properties.uuid.bytes, sizeof properties.uuid.bytes);
}

int device_of(const std::string& uuid) {
  for (int device = 0; device < cuda_device_count(); ++device) {
    if (uuid_of(device) == uuid) return device;
  }
  return -1;
}

}  // namespace asyncdiff
