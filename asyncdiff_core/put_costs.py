"""What puts cost between two devices of this machine, by mode and size."""

from __future__ import annotations

from dataclasses import dataclass

from . import _core
from .errors import DeviceError


@dataclass(frozen=True)
class PutCosts:
    """Microseconds of a put, one way, to one receiver; keys are bytes."""

    inline_us: dict[int, float]
    kernel_us: dict[int, float]
    copy_us: dict[int, float]
    #: of each further tensor of a bundle that is copied
    copy_node_us: float
    text: str

    @classmethod
    def from_text(cls, text: str) -> PutCosts:
        """From the text that is kept on the disk."""
        node, _, *numbers = text.splitlines()[1].split() + text.split("\n", 2)[2].split()
        rows = [numbers[i : i + 4] for i in range(0, len(numbers), 4)]
        inline, kernel, copy = (
            {int(r[0]): float(r[c]) for r in rows if float(r[c]) > 0} for c in (1, 2, 3)
        )
        return cls(inline, kernel, copy, float(node), text)

    def fastest(self, nbytes: int, *, tensors: int = 1, receivers: int = 1) -> str:
        """The mode that "auto" takes for such a bundle."""
        return _core.fastest_put(self.text, nbytes, tensors, receivers)


def put_costs(from_device: int, to_device: int, *, transport: str = "peer") -> PutCosts:
    """Measure, or read what was measured before; see ASYNCDIFF_CACHE.

    Raises DeviceError without CUDA.
    """
    if not _core.cuda_built() or max(from_device, to_device) >= _core.cuda_devices():
        raise DeviceError(
            f"put costs between CUDA devices {from_device} and {to_device}: there are "
            f"{_core.cuda_devices()} devices"
        )
    return PutCosts.from_text(_core.put_costs(from_device, to_device, transport))
