// What makes captured CUDA graphs faster.
#pragma once

#include <cuda_runtime_api.h>

#include "asyncdiff/export.hpp"

namespace asyncdiff {

// Puts kernels in the place of a graph's small memsets, and returns how many. A library clears its
// workspace with one before many of its kernels, and between two kernels a memset node takes a
// microsecond or two longer than a kernel that does the same. Large ones, those of several rows,
// those in child graphs and those of graphs that allocate memory stay. The graph must not be
// instantiated yet, and belong to the device. Throws CudaError where it cannot be read.
ASYNCDIFF_EXPORT int replace_memsets(cudaGraph_t graph, int device);

}  // namespace asyncdiff
