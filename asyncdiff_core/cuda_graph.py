"""What makes captured CUDA graphs faster."""

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
    if not _core.cuda_built():
        raise DeviceError(
            "replace_memsets: the extension was built without CUDA; build it where nvcc is on the "
            "PATH"
        )
    return _core.replace_memsets(graph, device)
