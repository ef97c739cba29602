// What makes captured CUDA graphs faster.
#pragma once

#include <cuda_runtime_api.h>

namespace asyncdiff {

// Puts kernels in the place of a graph's small memsets, and returns how many. A library clears its
// workspace with one before many of its kernels, and between two kernels a memset node takes a
// microsecond or two longer than a kernel that does the same. Large ones, and those in child
// graphs, stay. The graph must not be instantiated yet, belong to the device, and not allocate
// memory: nothing can be removed from one that does. Throws CudaError; the graph is then of no use.
int replace_memsets(cudaGraph_t graph, int device);

}  // namespace asyncdiff
