"""The exchange engine: fabrics, channels, slots. Knows nothing of diffusion.

    from asyncdiff_core import HostFabric, Layout, TensorSpec

    fabric = HostFabric(2)
    channel = fabric.channel(0, [1], Layout([TensorSpec("float32", (4, 8))]))
    channel.put([array], slot=0)        # rank 0's thread
    channel.get(1, slot=0)              # rank 1's thread; then read channel.slot(1, 0)
    channel.release(1, slot=0)

CudaFabric does the same between GPUs, on streams and inside CUDA graphs.
"""

try:
    from ._core import Buffer, Layout, TensorSpec, build_info, cuda_built, cuda_devices
except ModuleNotFoundError as error:
    if error.name != f"{__name__}._core":
        raise
    raise ImportError(
        f"{__path__[0]} holds asyncdiff_core's sources and no extension for this Python: run from "
        "another folder, so that the installed package is found, or build it here with "
        "pip install -e ."
    ) from None
from .channel import Channel
from .cuda_graph import replace_memsets, upload_graph
from .errors import (
    Aborted,
    AuthenticationError,
    CollectiveTimeout,
    CoreError,
    CudaError,
    DeviceError,
    ExchangeTimeout,
    InvalidArgument,
    NcclError,
    ProcessLost,
    SlotOrderError,
)
from .fabric import CudaFabric, Fabric, HostFabric, simulated_link, transport
from .nvtx import nvtx_range
from .paths import (
    get_cmake_dir,
    get_compile_flags,
    get_include,
    get_link_flags,
    get_pkgconfig_dir,
)
from .put_costs import PutCosts, put_costs
from .rendezvous import CallbackRendezvous, Rendezvous, StoreRendezvous
from .socket_rendezvous import SocketRendezvous

__all__ = [
    "Aborted",
    "AuthenticationError",
    "Buffer",
    "CallbackRendezvous",
    "Channel",
    "CollectiveTimeout",
    "CoreError",
    "CudaError",
    "CudaFabric",
    "DeviceError",
    "ExchangeTimeout",
    "Fabric",
    "HostFabric",
    "InvalidArgument",
    "Layout",
    "NcclError",
    "ProcessLost",
    "PutCosts",
    "Rendezvous",
    "SlotOrderError",
    "SocketRendezvous",
    "StoreRendezvous",
    "TensorSpec",
    "build_info",
    "cuda_built",
    "cuda_devices",
    "get_cmake_dir",
    "get_compile_flags",
    "get_include",
    "get_link_flags",
    "get_pkgconfig_dir",
    "nvtx_range",
    "put_costs",
    "replace_memsets",
    "simulated_link",
    "transport",
    "upload_graph",
]
