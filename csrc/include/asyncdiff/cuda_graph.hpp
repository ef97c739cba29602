// What makes captured CUDA graphs faster, and ready.
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

// Puts an instantiated graph on its device, and waits until it is there. Else its first launch
// does: that allocates memory, which may wait for whatever runs on this device and on its peers,
// and a graph there may be waiting for this one. Throws CudaError.
ASYNCDIFF_EXPORT void upload_graph(cudaGraphExec_t graph, int device);

}  // namespace asyncdiff
