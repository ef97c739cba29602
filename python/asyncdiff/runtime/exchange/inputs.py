"""Latents on their way from process 0 to the others, where it alone gets noise predictions.

Then it alone has a sampler that knows where it is: what the others' callers pass as latents, and
whatever else changes from step to step, is not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import asyncdiff_core as core

from ...schedule.actions import Tick
from ..step import Caller, Earlier
from .credits import Credits
from .results import Arrivals


class SharedInputs:
    """The moving inputs of a tick: put by process 0, which has no ``arrivals``, for all others.
    ``stream`` sends them on a GPU."""

    def __init__(
        self,
        channel: core.Channel,
        arrivals: Arrivals | None,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._channel, self._arrivals, self._stream = channel, arrivals, stream
        self._credits = Credits()
        #: those of the last ticks, by the first step that each served
        self._kept: dict[int, list[torch.Tensor]] = {}

    def begin(self) -> None:
        """A generation begins."""
        self._kept.clear()
        self._credits.begin()
        if self._arrivals is not None:
            self._arrivals.begin()

    def share(
        self, step: int, mine: Sequence[torch.Tensor], needed: Sequence[int], caller: Caller | None
    ) -> list[torch.Tensor]:
        """Process 0's moving inputs of the tick that serves ``step``, and maybe more; ``needed``
        are the steps whose inputs its runs take. Ready in order of the caller's stream."""
        oldest = min(needed, default=step)
        self._kept = {k: v for k, v in self._kept.items() if k >= oldest}
        self._kept[step] = out = self._exchange(mine, caller)
        return out

    def of_tick(
        self,
        tick: Tick,
        tensors: Sequence[torch.Tensor],
        earlier: Earlier,
        latents: Sequence[int],
    ) -> tuple[list[torch.Tensor], Earlier]:
        """The inputs of a tick with those that move, ``latents`` by index, of process 0, now and
        at earlier steps."""
        out, step = list(tensors), tick.serves[0]
        mine = [tensors[i] for i in latents]
        caller = None if self._stream is None else Caller(mine[0].device)
        for i, tensor in zip(latents, self.share(step, mine, tick.latents, caller), strict=True):
            out[i] = tensor
        return out, {k: self.earlier(k) for k in earlier}

    def earlier(self, step: int) -> list[torch.Tensor]:
        """Those of an earlier tick."""
        return self._kept[step]

    def _exchange(self, mine: Sequence[torch.Tensor], caller: Caller | None) -> list[torch.Tensor]:
        if self._arrivals is not None:
            return self._arrivals.take(caller)
        slot = self._credits.take(self._channel)
        dense = [t.contiguous() for t in mine]
        if caller is None or self._stream is None:
            self._channel.put(dense, slot)
            return [t.clone() for t in mine]
        self._stream.wait_stream(caller.stream)
        with torch.cuda.stream(self._stream):
            # The caller's may lie on another device than the process's seat, and change later.
            there = [t.to(self._stream.device, copy=True) for t in dense]
        self._channel.put(there, slot, self._stream)
        caller.stream.wait_stream(self._stream)
        return there
