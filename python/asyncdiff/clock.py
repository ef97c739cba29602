"""What one rank knows of time: counters, and what its program needs of it, on the device."""

from __future__ import annotations

import torch

from .update import kernels


class Clock:
    """Writes a tick's part of a table where a rank's program reads it, and counts.

    ``table`` has a row for every tick, and one that is written after the last tick and never used;
    ``target`` (flat, as long as a row, of the same dtype; None with the table) is where the tick's
    row goes. ``step`` is an :class:`asyncdiff.update.Update`'s counter.
    """

    def __init__(
        self,
        target: torch.Tensor | None,
        table: torch.Tensor | None,
        device: torch.device,
        step: torch.Tensor | None = None,
        triton: bool | None = None,
    ) -> None:
        self._target = target
        self._table = table
        self._step = step
        self._kernels = kernels(device, triton)
        counters = 1 if self._kernels is None else self._kernels.ticks_of(target)
        #: all the same: every program of the kernel has its own
        self._tick = torch.zeros(counters, dtype=torch.int64, device=device)

    def rewind(self) -> None:
        """Count from the first tick and the first step again."""
        self._tick.zero_()
        if self._step is not None:
            self._step.zero_()

    def load(self) -> None:
        """Begin a generation, whose rows are in the table."""
        self.rewind()
        if self._target is not None:
            assert self._table is not None
            self._target.copy_(self._table[0])

    def advance(self, served: int) -> None:
        """Go on to the next tick, after one that served so many steps."""
        if self._target is None and self._step is None:
            return
        if self._kernels is not None:
            self._kernels.tick(self._tick, self._table, self._target, self._step, served)
            return
        self._tick.add_(1)
        if self._target is not None:
            assert self._table is not None
            self._target.copy_(self._table.index_select(0, self._tick)[0])
        if self._step is not None:
            self._step.add_(served)
