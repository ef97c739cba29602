#include "links.hpp"

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "cuda_memory.hpp"
#include "device_guard.hpp"
#include "kernels.hpp"

namespace asyncdiff {

namespace {

constexpr std::uint32_t kWords = kProbeBytes / 2 / sizeof(std::uint32_t);  // by each writer

std::string pair_text(int from, int to) {
  return "CUDA device " + std::to_string(from) + " to " + std::to_string(to);
}

// Empty if peer access works in this direction, else why not.
std::string try_peer(int from, int to) {
  int possible = 0;
  check_cuda(cudaDeviceCanAccessPeer(&possible, from, to), "asking for peer access");
  if (!possible) return "the driver offers no peer access from " + pair_text(from, to);
  try {
    {
      const DeviceGuard guard(from);
      const cudaError_t code = cudaDeviceEnablePeerAccess(to, 0);
      if (code == cudaErrorPeerAccessAlreadyEnabled) {
        cudaGetLastError();
      } else {
        check_cuda(code, "enabling peer access");
      }
    }
    const Buffer target = allocate_device(to, kProbeBytes);
    const std::string failure = write_probe(from, target.data, 12345);
    if (!failure.empty()) return failure;
    if (!read_probe(to, target.data, 12345))
      return "a write from " + pair_text(from, to) + " was lost";
    return "";
  } catch (const CudaError& error) {
    return error.what();
  }
}

}  // namespace

std::string write_probe(int from, std::byte* target, std::uint32_t seed) {
  try {
    const Buffer source = allocate_device(from, kProbeBytes);
    const DeviceGuard guard(from);
    launch_fill(reinterpret_cast<std::uint32_t*>(target), kWords, seed, nullptr);
    launch_fill(reinterpret_cast<std::uint32_t*>(source.data), kWords, seed + kWords, nullptr);
    check_cuda(cudaMemcpyAsync(target + kProbeBytes / 2, source.data, kProbeBytes / 2,
                               cudaMemcpyDefault, nullptr),
               "copying to a peer");
    check_cuda(cudaDeviceSynchronize(), "writing to a peer");
    return "";
  } catch (const CudaError& error) {
    return error.what();
  }
}

bool read_probe(int device, const std::byte* memory, std::uint32_t seed) {
  std::vector<std::uint32_t> seen(2 * kWords);
  const DeviceGuard guard(device);
  check_cuda(cudaMemcpy(seen.data(), memory, kProbeBytes, cudaMemcpyDeviceToHost),
             "reading a probe back");
  for (std::uint32_t i = 0; i < 2 * kWords; ++i) {
    if (seen[i] != seed + i) return false;
  }
  return true;
}

std::map<std::pair<int, int>, Link> find_links(const std::vector<int>& devices) {
  std::map<std::pair<int, int>, Link> out;
  const std::set<int> all(devices.begin(), devices.end());
  for (int a : all) {
    for (int b : all) {
      if (a >= b) continue;
      std::string reason = try_peer(a, b);
      if (reason.empty()) reason = try_peer(b, a);
      out[{a, b}] = out[{b, a}] = Link{reason.empty(), false, reason};
    }
  }
  return out;
}

}  // namespace asyncdiff
