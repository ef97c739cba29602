"""What makes captured CUDA graphs faster, and ready."""

from __future__ import annotations

from . import _core
from .errors import DeviceError


def replace_memsets(graph: int, device: int) -> int:
    """Put kernels in the place of a graph's small memsets; how many.

    ``graph``: a ``cudaGraph_t`` of that CUDA device, not instantiated yet
    (``torch.cuda.CUDAGraph(keep_graph=True).raw_cuda_graph()``). Libraries clear their workspaces
    with memsets, and between two kernels a memset takes a microsecond or two longer than a third
    kernel. Graphs that allocate memory stay as they are: nothing can be removed from them.

    Raises DeviceError without CUDA, CudaError where the graph cannot be read.
    """
    _check_built("replace_memsets")
    return _core.replace_memsets(graph, device)


def upload_graph(graph: int, device: int) -> None:
    """Put an instantiated graph on its device, and wait until it is there.

    ``graph``: a ``cudaGraphExec_t`` of that CUDA device
    (``torch.cuda.CUDAGraph.raw_cuda_graph_exec()``). Else its first launch does that, which
    allocates memory: that may wait for whatever runs on this device and on its peers, and a graph
    there may be waiting for this one.

    Raises DeviceError without CUDA, CudaError where CUDA refuses.
    """
    _check_built("upload_graph")
    _core.upload_graph(graph, device)


def _check_built(what: str) -> None:
    if not _core.cuda_built():
        raise DeviceError(
            f"{what}: the extension was built without CUDA; build it where nvcc is on the PATH"
        )
