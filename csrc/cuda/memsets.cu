// Memset nodes of a graph, done by kernels.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "asyncdiff/cuda_graph.hpp"
#include "check.hpp"
#include "device_guard.hpp"
#include "kernels.hpp"
#include "launch.hpp"

namespace asyncdiff {

namespace {

constexpr unsigned kThreads = 256;
// Above, the memory's bandwidth is what counts.
constexpr std::size_t kLargest = std::size_t{1} << 20;

// Byte i becomes byte i % 4 of `pattern`.
__global__ void memset_kernel(std::byte* to, std::size_t nbytes, std::uint32_t pattern) {
  const std::size_t first = blockIdx.x * std::size_t{kThreads} + threadIdx.x;
  const std::size_t step = gridDim.x * std::size_t{kThreads};
  if ((reinterpret_cast<std::uintptr_t>(to) | nbytes) % 4 == 0) {
    for (std::size_t i = first; i < nbytes / 4; i += step) {
      reinterpret_cast<std::uint32_t*>(to)[i] = pattern;
    }
  } else {
    for (std::size_t i = first; i < nbytes; i += step) {
      to[i] = static_cast<std::byte>(pattern >> (8 * (i % 4)));
    }
  }
}

using Nodes = std::vector<cudaGraphNode_t>;

// All that ask(nodes, count) tells of; false where it cannot.
template <class Ask>
bool read(Ask ask, Nodes& into) {
  std::size_t count = 0;
  if (ask(nullptr, &count) != cudaSuccess) return false;
  into.resize(count);
  return count == 0 || ask(into.data(), &count) == cudaSuccess;
}

// From CUDA 13 on the kinds of edges can be asked for too; not to ask fails where one is special.
#if CUDART_VERSION >= 13000
#define ASYNCDIFF_EDGES nullptr,
#else
#define ASYNCDIFF_EDGES
#endif

bool read_edges(cudaGraphNode_t node, Nodes& before, Nodes& after) {
  return read(
             [node](cudaGraphNode_t* nodes, std::size_t* count) {
               return cudaGraphNodeGetDependencies(node, nodes, ASYNCDIFF_EDGES count);
             },
             before) &&
         read(
             [node](cudaGraphNode_t* nodes, std::size_t* count) {
               return cudaGraphNodeGetDependentNodes(node, nodes, ASYNCDIFF_EDGES count);
             },
             after);
}

std::uint32_t pattern_of(const cudaMemsetParams& memset) {
  if (memset.elementSize == 1) return (memset.value & 0xffu) * 0x01010101u;
  if (memset.elementSize == 2) return (memset.value & 0xffffu) * 0x00010001u;
  return memset.value;
}

// A kernel in the place of a memset. False where that cannot be done; the graph then does what it
// did: at worst the memory is set twice.
bool replace(cudaGraph_t graph, cudaGraphNode_t node, const cudaMemsetParams& memset) {
  Nodes before;
  Nodes after;
  if (!read_edges(node, before, after)) return false;
  auto* to = static_cast<std::byte*>(memset.dst);
  std::size_t nbytes = memset.width * memset.elementSize;
  std::uint32_t pattern = pattern_of(memset);
  void* arguments[] = {&to, &nbytes, &pattern};
  const std::size_t blocks = (nbytes + 4 * kThreads - 1) / (4 * kThreads);
  cudaKernelNodeParams kernel{};
  kernel.func = reinterpret_cast<void*>(&memset_kernel);
  kernel.gridDim = dim3(static_cast<unsigned>(std::clamp<std::size_t>(blocks, 1, 128)));
  kernel.blockDim = dim3(kThreads);
  kernel.kernelParams = arguments;
  cudaGraphNode_t made = nullptr;
  if (cudaGraphAddKernelNode(&made, graph, before.data(), before.size(), &kernel) != cudaSuccess) {
    return false;
  }
  const Nodes same(after.size(), made);
  if (cudaGraphAddDependencies(graph, same.data(), after.data(), ASYNCDIFF_EDGES after.size()) !=
      cudaSuccess) {
    check_cuda(cudaGraphDestroyNode(made), "removing a node from a graph");
    return false;
  }
  return cudaGraphDestroyNode(node) == cudaSuccess;
}

#undef ASYNCDIFF_EDGES

cudaGraphNodeType type_of(cudaGraphNode_t node) {
  cudaGraphNodeType type{};
  check_cuda(cudaGraphNodeGetType(node, &type), "reading a graph");
  return type;
}

}  // namespace

int replace_memsets(cudaGraph_t graph, int device) {
  const DeviceGuard guard(device);
  std::size_t count = 0;
  check_cuda(cudaGraphGetNodes(graph, nullptr, &count), "reading a graph");
  Nodes nodes(count);
  if (count > 0) check_cuda(cudaGraphGetNodes(graph, nodes.data(), &count), "reading a graph");
  // Nothing can be removed from a graph that allocates memory.
  const bool fixed = std::any_of(nodes.begin(), nodes.end(), [](cudaGraphNode_t node) {
    const cudaGraphNodeType type = type_of(node);
    return type == cudaGraphNodeTypeMemAlloc || type == cudaGraphNodeTypeMemFree;
  });
  if (fixed) return 0;
  int replaced = 0;
  for (cudaGraphNode_t node : nodes) {
    if (type_of(node) != cudaGraphNodeTypeMemset) continue;
    cudaMemsetParams memset{};
    check_cuda(cudaGraphMemsetNodeGetParams(node, &memset), "reading a graph's memset");
    const bool small = memset.width * memset.elementSize <= kLargest;
    if (memset.height == 1 && small && replace(graph, node, memset)) ++replaced;
  }
  cudaGetLastError();  // of what could not be replaced
  return replaced;
}

void preload_memsets() { preload<memset_kernel>(); }

}  // namespace asyncdiff
