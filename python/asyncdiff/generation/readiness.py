"""Since when the inputs of a step's later calls have been ready.

The caller's stream waits for the result of every call. What it had to do before an earlier call of
the same step was ready then, and a later call that needs no more need not wait for that result.
"""

from __future__ import annotations

from typing import Any

import torch

from ..graph.signature import Call, Role
from ..runtime.step import READY_NOW, Caller, Ready

_Mark = tuple[Any, ...]


class Readiness:
    """What is known of the tensors of calls that follow each other.

    Of what moves, a later call has the same memory, not written to since, as torch counts writes.
    Conditioning that no call had before was there before the earlier call if less has been
    allocated on its device between that call and this one, but by calls, than it takes itself, and
    has its first values if it was never written to: pipelines make a call's timestep, a few bytes.
    (Who fills memory without torch, as by replaying a CUDA graph, does so before the step.)
    """

    def __init__(self) -> None:
        self._earlier: tuple[list[torch.Tensor], list[_Mark], Caller] | None = None
        #: bytes that had been allocated on a device when the last call returned, in all
        self._allocated: tuple[torch.device, int] | None = None
        #: bytes that were allocated between calls since the earlier one; None: it is not known
        self._between: int | None = None
        #: the conditioning of the earlier call
        self._given: list[torch.Tensor] = []
        #: conditioning of the call that has come in that was there before the last one returned
        self._there: list[torch.Tensor] | None = None

    def came(self, call: Call, new: bool) -> None:
        """A call comes in. ``new``: with conditioning that no call before had."""
        self._there, allocated, self._allocated = None, self._allocated, None
        now = None if allocated is None else _allocated_on(allocated[0])
        more = None if allocated is None or now is None else now[1] - allocated[1]
        if allocated is None or more is None or more < 0 or self._between is None:
            self._between = None
            return
        self._between += more
        if not new:
            return
        tensors = _conditioning(call)
        if all(t.device.type == "cpu" or self._was_there(t, allocated[0]) for t in tensors):
            self._there = tensors

    def returned(self, call: Call, new_next: bool) -> None:
        """Its result is given to the caller. ``new_next``: a call that comes may have conditioning
        that none had before."""
        device = call.tensors[call.indices(Role.LATENTS)[0]].device
        if new_next and device.type == "cuda":
            self._allocated = _allocated_on(device)

    def of(self, call: Call) -> Ready:
        """Since when the call's tensors are ready."""
        moving = [
            call.tensors[i] for role in (Role.LATENTS, Role.TIMESTEP) for i in call.indices(role)
        ]
        device = moving[0].device
        if device.type != "cuda" or any(t.is_inference() for t in moving):
            return READY_NOW
        marks = [(t.data_ptr(), t._version, t.dtype, t.shape, t.stride()) for t in moving]
        if self._earlier is not None:
            tensors, then, caller = self._earlier
            untouched = [t._version for t in tensors] == [mark[1] for mark in then]
            if marks == then and untouched and caller.stream == torch.cuda.current_stream(device):
                return Ready(caller, caller if self._same_as_came(call) else None)
        self._earlier, self._between = (moving, marks, Caller(device)), 0
        self._given = _conditioning(call)
        return Ready(self._earlier[2])

    def _same_as_came(self, call: Call) -> bool:
        there, now = self._there, _conditioning(call)
        return there is not None and [id(t) for t in now] == [id(t) for t in there]

    def _was_there(self, tensor: torch.Tensor, device: torch.device) -> bool:
        """Whether a tensor on this device had the values that it has before the earlier call."""
        assert self._between is not None
        if tensor.device != device or tensor.is_inference() or tensor._version > 0:
            return False
        if self._between == 0 or any(tensor is t for t in self._given):
            return True
        return self._between < tensor.untyped_storage().nbytes()

    def forget(self) -> None:
        """What comes next has nothing to do with what came before."""
        self._earlier = self._allocated = self._there = None
        self._given = []


def _conditioning(call: Call) -> list[torch.Tensor]:
    return [call.tensors[i] for i in call.indices(Role.CONDITIONING)]


def _allocated_on(device: torch.device) -> tuple[torch.device, int] | None:
    """Bytes that have been asked for on a device, in all; None where that is not counted."""
    # Not memory_stats(), which sorts all there is by name.
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    count = stats.get("requested_bytes", {}).get("all", {}).get("allocated")
    return None if not count else (device, count)
