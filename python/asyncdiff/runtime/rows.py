"""A rank's rows: what its component needs of a timestep, computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..graph.row import TABLE_BYTES, Row
from .cuda_graphs import GraphCache, Issued
from .step import Time

#: Among a worker's CUDA graphs, that which computes a row.
_GRAPH = "row"


class Rows:
    """The row that a rank's program reads, and a table of those of the same generation.

    ``program`` computes the values of a row from ``arguments()``, among them ``time``, the static
    timestep; without a program there is nothing to compute. Not thread-safe. All but :meth:`begin`
    work on the current stream.
    """

    def __init__(
        self,
        program: Callable[..., list[Any]] | None,
        arguments: Callable[[], Sequence[torch.Tensor | None]],
        time: torch.Tensor | None,
        graphs: GraphCache,
    ) -> None:
        self.program = program
        self._arguments = arguments
        self.time = time
        self._graphs = graphs
        self.row: Row | None = None
        #: what the rank's program reads of it
        self.values: list[torch.Tensor] = []
        #: packed rows, the one that was kept first in front, by the version of the conditioning
        #: that they were computed with, and the timestep
        self.table: dict[tuple[int, float], torch.Tensor] = {}
        #: room for so many, and the part of it that is not used yet
        self.slots = 0
        self._free: list[torch.Tensor] = []

    def begin(self, steps: int) -> None:
        """Make room for the rows of a generation with so many steps. Call when idle."""
        fits = self.row is not None and steps * self.row.nbytes <= TABLE_BYTES
        slots = steps if fits else 0
        if slots != self.slots:
            self.slots = slots
            self.clear()

    def select(self, time: Time, version: int) -> None:
        """Make the row that of a timestep: copy it from the table, or compute it and keep it.

        ``version`` is that of the conditioning. A tensor has to lie in the static input already.
        """
        if self.program is None or time is None:
            return
        if isinstance(time, torch.Tensor):
            self._compute()
            return
        assert self.row is not None and self.time is not None
        found = self.table.get((version, time))
        if found is not None:
            self.row.memory.copy_(found)
            return
        self.time.fill_(time)
        self._compute()
        if self.slots:
            slot = self._slot(self.row)
            slot.copy_(self.row.memory)
            self.table[version, time] = slot

    def prepare(self) -> None:
        """Capture the graph that computes a row, if it is still missing."""
        if self.program is not None:
            self._graphs.record(_GRAPH, self.execute)

    def warm_up(self) -> None:
        """Compute a row for the first time, which fixes where its values lie."""
        if self.program is not None and self.time is not None:
            self.execute()
            # As select does: kernels are loaded now, not while another rank waits.
            self.time.fill_(0)

    def execute(self) -> Issued:
        """Compute the row for the timestep in the static input."""
        assert self.program is not None
        values = self.program(*self._arguments())
        if self.row is None:
            self.row = Row(values)
            self.values = self.row.values
        self.row.store(values)
        return Issued([])

    def clear(self) -> None:
        """Drop the table. Call when idle."""
        self.table.clear()
        self._free.clear()

    def close(self) -> None:
        """Drop the program, too, and with it its weights. Call when idle; the last call."""
        self.clear()
        self.program = self.row = self.time = None
        self.values = []

    def _compute(self) -> None:
        self._graphs.issue(_GRAPH, self.execute)

    def _slot(self, row: Row) -> torch.Tensor:
        """Memory for one more row, if need be that of the one that was kept first."""
        if not self.table and not self._free:
            memory = row.memory.new_empty(self.slots, row.nbytes)
            self._free = list(memory.unbind())
        return self._free.pop() if self._free else self.table.pop(next(iter(self.table)))
