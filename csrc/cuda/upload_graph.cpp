#include <cuda_runtime_api.h>

#include "asyncdiff/cuda_graph.hpp"
#include "check.hpp"
#include "device_guard.hpp"

namespace asyncdiff {

void upload_graph(cudaGraphExec_t graph, int device) {
  const DeviceGuard guard(device);
  // A stream of its own: the default stream would wait for, and hold up, unrelated work.
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  cudaError_t code = cudaGraphUpload(graph, stream);
  if (code == cudaSuccess) code = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  check_cuda(code, "uploading a graph");
}

}  // namespace asyncdiff
