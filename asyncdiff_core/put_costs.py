"""What puts cost between two devices of this machine, by mode and size."""

from __future__ import annotations

from dataclasses import dataclass

from . import _core
from .errors import DeviceError


@dataclass(frozen=True)
class PutCosts:
    """What one put takes from the sender's call until the receiver has it, one way, in
    microseconds.

    Each table maps bytes to the cost of one tensor to one receiver, by mode; ``inline_us`` has no
    sizes that are too large to be worth it. ``copy_node_us`` is the cost of each further copy of a
    bundle that copy engines move: one a tensor and receiver. ``text`` is the table as it is kept on
    the disk.
    """

    inline_us: dict[int, float]
    kernel_us: dict[int, float]
    copy_us: dict[int, float]
    copy_node_us: float
    text: str

    @classmethod
    def from_text(cls, text: str) -> PutCosts:
        """Read a table as it is kept on the disk. Raises InvalidArgument for anything else."""
        node, rows = _core.parse_put_costs(text)
        inline, kernel, copy = ({r[0]: float(r[c]) for r in rows if r[c] > 0} for c in (1, 2, 3))
        return cls(inline, kernel, copy, node, text)

    def fastest(self, nbytes: int, *, tensors: int = 1, receivers: int = 1) -> str:
        """The mode that "auto" takes for a bundle of ``nbytes`` in so many tensors: "inline",
        "kernel" or "copy"."""
        return _core.fastest_put(self.text, nbytes, tensors, receivers)


def put_costs(from_device: int, to_device: int, *, transport: str = "peer") -> PutCosts:
    """Measure what puts cost between two CUDA devices of this process, given by index, or read
    what was measured before on this machine (in the folder ASYNCDIFF_CACHE).

    Measuring takes a second or two, three at most, and uses both devices; costs as they are on
    NVLinked H200s stand in where a GPU is too busy. ``transport``: "peer", "staged" or "auto", as
    for :class:`CudaFabric`. Raises DeviceError for devices that do not exist, and without CUDA;
    InvalidArgument for another transport.
    """
    devices = range(_core.cuda_devices() if _core.cuda_built() else 0)
    if from_device not in devices or to_device not in devices:
        raise DeviceError(
            f"put costs between CUDA devices {from_device} and {to_device}: there are "
            f"{len(devices)} devices"
        )
    return PutCosts.from_text(_core.put_costs(from_device, to_device, transport))
