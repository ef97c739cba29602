"""Noise predictions on their way to other processes.

A rank that delivers one has a channel of its own for them, to one rank of every other process: the
process's *seat*. Whoever lies in one process with the rank is given its outputs as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import asyncdiff_core as core

from ..devices import Place
from ..step import Caller
from .awaited import Awaited, Bundles
from .buffers import as_laid_out, memory_of, tensors_in

#: Slots of such a channel. On one host one will do: a prediction is taken long before the next one
#: is there, and a rank's CUDA graphs do not depend on it. Between hosts the next one is not to wait
#: until everybody has told that they have taken it.
SLOTS, SLOTS_BETWEEN_HOSTS = 1, 2
#: How it moves between GPUs: one launch stores it to all of its receivers.
MODE = "kernel"


@dataclass(frozen=True)
class Result:
    """A rank's end of the way that its noise predictions take: what is put there, of its outputs.
    ``fabric`` puts it and bundles in one launch."""

    fabric: core.Fabric
    channel: core.Channel
    layout: core.Layout
    positions: tuple[int, ...]

    def values(self, outputs: Sequence[Any]) -> list[torch.Tensor]:
        """The tensors of the outputs, as they are laid out."""
        mine = (outputs[i] for i in self.positions)
        return [as_laid_out(v, s) for v, s in zip(mine, self.layout.specs, strict=True)]


class Arrivals:
    """A process's end of the way that noise predictions of a rank of another process take.

    ``seat`` is its rank there, at ``place``. ``outputs`` are the leaves of the denoiser's result,
    with constants where they are constant; ``positions`` are those of its tensors.
    """

    def __init__(
        self,
        channel: Bundles,
        layout: core.Layout,
        seat: int,
        place: Place,
        outputs: Sequence[Any],
        positions: Sequence[int],
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._channel, self._layout, self._seat = channel, layout, seat
        self._outputs, self._positions = list(outputs), positions
        self._stream = stream
        #: by slot
        self._values = [
            tensors_in(memory_of(channel.slot(seat, slot), place.device), layout)
            for slot in range(channel.slots)
        ]
        self._taken = 0

    def begin(self) -> None:
        """The fabric is reset: nothing was sent yet."""
        self._taken = 0

    def take(self, caller: Caller | None, busy: Sequence[torch.cuda.Stream] = ()) -> list[Any]:
        """The next outputs, as new tensors on the caller's device, ready in order of its stream; on
        the CPU the caller's thread waits. ``busy``: streams of this GPU that compute meanwhile.
        Raises what the core does."""
        slot = self._taken % len(self._values)
        self._taken += 1
        values = self._values[slot]
        if caller is None or self._stream is None:
            self._channel.get(self._seat, slot)
            new = [v.clone() for v in values]
            self._channel.release(self._seat, slot)
            return self._among_constants(new)
        main, mine = caller.stream, self._stream
        with torch.cuda.stream(main):  # whose memory they are
            new = [torch.empty_like(v, device=main.device) for v in values]
        # A kernel that waits takes a place of a multiprocessor: enough that kernels which fill all
        # of them take two turns. So it begins to wait when this GPU has nothing else to do. Where
        # the host waits, no kernel does.
        for stream in (main, *(() if isinstance(self._channel, Awaited) else busy)):
            mine.wait_stream(stream)
        self._channel.get(self._seat, slot, mine)
        with torch.cuda.stream(mine):
            for there, here in zip(new, values, strict=True):
                there.copy_(here, non_blocking=True)
        self._channel.release(self._seat, slot, mine)
        main.wait_stream(mine)
        return self._among_constants(new)

    def _among_constants(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        return among_constants(self._outputs, self._positions, tensors)


def among_constants(
    outputs: Sequence[Any], positions: Sequence[int], tensors: Sequence[torch.Tensor]
) -> list[Any]:
    """The leaves ``outputs`` of a denoiser's result, with tensors where they belong."""
    leaves = list(outputs)
    for position, tensor in zip(positions, tensors, strict=True):
        leaves[position] = tensor
    return leaves
