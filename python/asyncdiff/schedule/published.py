"""The published schedule (AsyncDiff: Chen et al., NeurIPS 2024), with stride denoising.

Rank i < N runs component i; rank N+o (o = 0 … S−2) runs a copy of the last component. In a tick all
values of other components are those of the tick before.
"""

from __future__ import annotations

from collections.abc import Sequence

from .actions import Exchange
from .builder import Builder


class Published(Builder):
    """Writes plans whose runs keep the newest ``held`` bundles of every source.

    ``order``: of the runs of an exact step. ``shift``: how many timesteps earlier ticks run.
    """

    def __init__(
        self,
        components: int,
        stride: int,
        exchanges: Sequence[Exchange],
        slots: int,
        *,
        order: Sequence[int],
        held: int,
        shift: int,
    ) -> None:
        ranks = [*range(components), *[components - 1] * (stride - 1)]
        super().__init__(ranks, exchanges, slots)
        self.stride, self.order, self.held, self.shift = stride, order, held, shift

    def exact(self, k: int) -> None:
        """Write the tick of an exact step: its runs one after another."""
        for i, component in enumerate(self.order):
            self._catch_up(component)
            delivers = component == self.last and component not in self.order[i + 1 :]
            self._run(component, k, k, k if delivers else None, read=1)
        for rank in range(len(self.sources)):  # who ran before its sources did holds the newest too
            self._catch_up(rank)
        self.tick(True, (k,))

    def asynchronous(self, steps: range, more: bool) -> None:
        """Write a tick for every S steps."""
        for k in steps[:: self.stride]:
            serves = range(k, min(k + self.stride, steps.stop))
            for rank in range(len(self.sources)):
                self._catch_up(rank)
            # A last tick with fewer steps left than S serves them with the copies first: nobody
            # reads what the others would send.
            if len(serves) == self.stride:
                for rank in range(self.last + 1):
                    step = serves[-1] if rank == self.last else None
                    self._run(rank, k, serves[-1] - self.shift, step, self.held)
            for copy, step in enumerate(serves[: self.stride - 1], start=self.last + 1):
                self._run(copy, k, step - self.shift, step, self.held, sends=False)
            for rank, sources in enumerate(self.sources):
                for source in sources:
                    self.give_back(rank, source, self.taken[rank, source] - self.held + 1)
            self.tick(False, serves)

    def _catch_up(self, rank: int) -> None:
        """Take every bundle sent so far: the newest are held."""
        for source in self.sources[rank]:
            self.take(rank, source, self.sent[source], self.held)

    def _run(
        self, rank: int, latents: int, time: int, step: int | None, read: int, sends: bool = True
    ) -> None:
        """A run on the newest ``read`` bundles of every source."""
        reads = []
        for source in self.sources[rank]:
            # -1 where none was ever sent (first in a circle)
            newest = self.taken[rank, source] - 1
            oldest = max(newest - read + 1, min(newest, 0))
            reads += [(source, ordinal) for ordinal in range(newest, oldest - 1, -1)]
        self.run(rank, latents, time, step, reads, sends)
