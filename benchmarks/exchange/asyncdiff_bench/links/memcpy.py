"""Plain copies between devices, and an event that the receiver's stream waits for."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from ..errors import BenchError
from ..payload import Memory, Payload
from .link import Link


class MemcpyLink(Link):
    """One cudaMemcpyAsync a tensor by a copy engine, all ranks in one process.

    Events belong to the graph that they are recorded in, so both ends of a captured program have to
    be in one graph; and a program may only wait for events of its own, which leaves out the first
    ``slots`` waits: those slots are free before it begins.
    """

    def __init__(
        self, world: Any, sender: int, receivers: Sequence[int], payload: Payload, slots: int
    ) -> None:
        super().__init__(world.devices, world.local, sender, receivers, payload, slots)
        self._slots = {
            r: [payload.memory(world.devices[r]) for _ in range(slots)] for r in receivers
        }
        self._arrived = [torch.cuda.Event() for _ in range(slots)]
        self._released = {r: [torch.cuda.Event() for _ in range(slots)] for r in receivers}
        self._copy = _memcpy()
        self._connect([world.devices[r] for r in (sender, *receivers)])

    @staticmethod
    def _connect(devices: Sequence[torch.device]) -> None:
        """Let torch switch peer access on, which it does for the first copy between two devices."""
        first = torch.zeros(1, device=devices[0])
        for device in devices[1:]:
            torch.empty(1, device=device).copy_(first)
        for device in devices if first.is_cuda else ():
            torch.cuda.synchronize(device)

    def holds(self, receiver: int) -> bool:
        return True

    def received(self, receiver: int, n: int) -> Memory:
        return self._slots[receiver][n % self.slots]

    def send(self, n: int, stream: Any) -> None:
        slot, handle = n % self.slots, stream.cuda_stream
        source = self.source(n).raw
        for rank in self.receivers:
            if n >= self.slots:
                stream.wait_event(self._released[rank][slot])
            for a, b in zip(source, self._slots[rank][slot].raw, strict=True):
                self._copy(b.data_ptr(), a.data_ptr(), a.numel(), handle)
        self._arrived[slot].record(stream)

    def receive(self, receiver: int, n: int, stream: Any) -> None:
        stream.wait_event(self._arrived[n % self.slots])

    def release(self, receiver: int, n: int, stream: Any) -> None:
        self._released[receiver][n % self.slots].record(stream)


@cache
def _memcpy() -> Any:
    """The driver's copy of device memory. Tensor.copy_ would also order the current streams of both
    devices, which is more than a plain copy."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuMemcpyDtoDAsync_v2
    except (OSError, AttributeError) as error:
        raise BenchError(f"the CUDA driver cannot be called: {error}") from error
    function.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    function.restype = ctypes.c_int

    def copy(target: int, source: int, nbytes: int, stream: int) -> None:
        code = function(target, source, nbytes, stream)
        if code:
            raise BenchError(f"cuMemcpyDtoDAsync failed with CUDA error {code}")

    return copy
