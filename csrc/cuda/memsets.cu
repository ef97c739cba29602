// Memset nodes of a graph, done by kernels.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "asyncdiff/cuda_graph.hpp"
#include "check.hpp"

namespace asyncdiff {

namespace {

constexpr unsigned kThreads = 256;
// Above, the memory's bandwidth is what counts.
constexpr std::size_t kLargest = std::size_t{1} << 20;

// Rows of bytes, `pitch` apart; byte i of each is byte i % 4 of `pattern`.
struct Rows {
  std::byte* to;
  std::size_t pitch;
  std::size_t width;
  std::size_t height;
  std::uint32_t pattern;
};

__global__ void memset_kernel(Rows rows) {
  const std::size_t first = blockIdx.x * std::size_t{kThreads} + threadIdx.x;
  const std::size_t step = gridDim.x * std::size_t{kThreads};
  const auto alignment = reinterpret_cast<std::uintptr_t>(rows.to) | rows.pitch | rows.width;
  for (std::size_t row = 0; row < rows.height; ++row) {
    std::byte* const to = rows.to + row * rows.pitch;
    if (alignment % 4 == 0) {
      for (std::size_t i = first; i < rows.width / 4; i += step) {
        reinterpret_cast<std::uint32_t*>(to)[i] = rows.pattern;
      }
    } else {
      for (std::size_t i = first; i < rows.width; i += step) {
        to[i] = static_cast<std::byte>(rows.pattern >> (8 * (i % 4)));
      }
    }
  }
}

Rows rows_of(const cudaMemsetParams& memset) {
  std::uint32_t pattern = memset.value;
  if (memset.elementSize == 1) pattern = (pattern & 0xffu) * 0x01010101u;
  if (memset.elementSize == 2) pattern = (pattern & 0xffffu) * 0x00010001u;
  const std::size_t width = memset.width * memset.elementSize;
  // The pitch of a single row means nothing.
  const std::size_t pitch = memset.height > 1 ? memset.pitch : 0;
  return {static_cast<std::byte*>(memset.dst), pitch, width, memset.height, pattern};
}

using Nodes = std::vector<cudaGraphNode_t>;

// All that `ask(nodes, count)` tells of.
template <class Ask>
Nodes all(Ask ask, const char* what) {
  std::size_t count = 0;
  check_cuda(ask(nullptr, &count), what);
  Nodes nodes(count);
  if (count > 0) check_cuda(ask(nodes.data(), &count), what);
  return nodes;
}

// CUDA 13 asks for the kinds of edges too. Those of memsets are all ordinary: only kernels have
// others.
#if CUDART_VERSION >= 13000
#define ASYNCDIFF_EDGES nullptr,
#else
#define ASYNCDIFF_EDGES
#endif

Nodes before(cudaGraphNode_t node) {
  return all(
      [node](cudaGraphNode_t* nodes, std::size_t* count) {
        return cudaGraphNodeGetDependencies(node, nodes, ASYNCDIFF_EDGES count);
      },
      "reading a graph's edges");
}

Nodes after(cudaGraphNode_t node) {
  return all(
      [node](cudaGraphNode_t* nodes, std::size_t* count) {
        return cudaGraphNodeGetDependentNodes(node, nodes, ASYNCDIFF_EDGES count);
      },
      "reading a graph's edges");
}

void replace(cudaGraph_t graph, cudaGraphNode_t memset, Rows rows) {
  const Nodes from = before(memset);
  const Nodes to = after(memset);
  void* arguments[] = {&rows};
  const std::size_t blocks = (rows.width + 4 * kThreads - 1) / (4 * kThreads);
  cudaKernelNodeParams kernel{};
  kernel.func = reinterpret_cast<void*>(&memset_kernel);
  kernel.gridDim = dim3(static_cast<unsigned>(std::clamp<std::size_t>(blocks, 1, 128)));
  kernel.blockDim = dim3(kThreads);
  kernel.kernelParams = arguments;
  cudaGraphNode_t node = nullptr;
  check_cuda(cudaGraphAddKernelNode(&node, graph, from.data(), from.size(), &kernel),
             "adding a kernel to a graph");
  const Nodes same(to.size(), node);
  check_cuda(cudaGraphAddDependencies(graph, same.data(), to.data(), ASYNCDIFF_EDGES to.size()),
             "adding edges to a graph");
  check_cuda(cudaGraphDestroyNode(memset), "removing a node of a graph");
}

#undef ASYNCDIFF_EDGES

}  // namespace

int replace_memsets(cudaGraph_t graph, int device) {
  const DeviceGuard guard(device);
  const Nodes nodes =
      all([graph](cudaGraphNode_t* out,
                  std::size_t* count) { return cudaGraphGetNodes(graph, out, count); },
          "reading a graph");
  int replaced = 0;
  for (cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type{};
    check_cuda(cudaGraphNodeGetType(node, &type), "reading a graph");
    if (type != cudaGraphNodeTypeMemset) continue;
    cudaMemsetParams memset{};
    check_cuda(cudaGraphMemsetNodeGetParams(node, &memset), "reading a graph's memset");
    const Rows rows = rows_of(memset);
    if (rows.width * rows.height > kLargest) continue;
    replace(graph, node, rows);
    ++replaced;
  }
  return replaced;
}

}  // namespace asyncdiff
