#include "links.hpp"

#include <cstdint>
#include <set>
#include <vector>

#include "check.hpp"
#include "cuda_memory.hpp"
#include "kernels.hpp"

namespace asyncdiff {

namespace {

constexpr std::uint32_t kCount = 1024;

std::string pair_text(int from, int to) {
  return "CUDA device " + std::to_string(from) + " to " + std::to_string(to);
}

bool holds(const Buffer& buffer, std::uint32_t seed) {
  std::vector<std::uint32_t> seen(kCount);
  const DeviceGuard guard(buffer.device);
  check_cuda(cudaMemcpy(seen.data(), buffer.data, kCount * 4, cudaMemcpyDeviceToHost),
             "reading the probe back");
  for (std::uint32_t i = 0; i < kCount; ++i) {
    if (seen[i] != seed + i) return false;
  }
  return true;
}

// Writes from one device into the memory of the other and reads it there.
std::string try_writing(int from, int to) {
  const Buffer source = allocate_device(from, kCount * 4);
  const Buffer target = allocate_device(to, kCount * 4);
  auto* words = reinterpret_cast<std::uint32_t*>(target.data);
  const DeviceGuard guard(from);
  launch_fill(words, kCount, 12345, nullptr);
  check_cuda(cudaDeviceSynchronize(), "writing to a peer");
  if (!holds(target, 12345)) return "a kernel's write from " + pair_text(from, to) + " was lost";
  launch_fill(reinterpret_cast<std::uint32_t*>(source.data), kCount, 67890, nullptr);
  check_cuda(cudaMemcpyAsync(target.data, source.data, kCount * 4, cudaMemcpyDefault, nullptr),
             "copying to a peer");
  check_cuda(cudaDeviceSynchronize(), "copying to a peer");
  if (!holds(target, 67890)) return "a copy from " + pair_text(from, to) + " was lost";
  return "";
}

// Empty if peer access works in this direction, else why not.
std::string try_peer(int from, int to) {
  int possible = 0;
  check_cuda(cudaDeviceCanAccessPeer(&possible, from, to), "asking for peer access");
  if (!possible) return "the driver offers no peer access from " + pair_text(from, to);
  try {
    const DeviceGuard guard(from);
    const cudaError_t code = cudaDeviceEnablePeerAccess(to, 0);
    if (code == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();
    } else {
      check_cuda(code, "enabling peer access");
    }
    return try_writing(from, to);
  } catch (const CudaError& error) {
    return error.what();
  }
}

}  // namespace

std::map<std::pair<int, int>, Link> find_links(const std::vector<int>& devices, bool demanded) {
  std::map<std::pair<int, int>, Link> out;
  const std::set<int> all(devices.begin(), devices.end());
  for (int a : all) {
    for (int b : all) {
      if (a >= b) continue;
      std::string reason = try_peer(a, b);
      if (reason.empty()) reason = try_peer(b, a);
      if (!reason.empty() && demanded) {
        throw DeviceError("peer access was asked for, but " + reason +
                          "; transport 'auto' stages through host memory instead");
      }
      out[{a, b}] = out[{b, a}] = Link{reason.empty(), reason};
    }
  }
  return out;
}

}  // namespace asyncdiff
