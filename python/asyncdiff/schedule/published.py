"""The published schedule (AsyncDiff: Chen et al., NeurIPS 2024), with stride denoising.

Rank i < N runs component i; rank N+o (o = 0 … S−2) runs a copy of the last component. In a tick all
values of other components are those of the tick before.
"""

from __future__ import annotations

from .actions import Action, Exchange, Tick
from .ledger import Ledger


class Builder:
    """Emits the ticks of one plan, whose runs keep the newest ``held`` bundles of every source."""

    def __init__(
        self, components: int, stride: int, edges: tuple[Exchange, ...], held: int, slots: int
    ) -> None:
        self.n = components
        self.stride = stride
        self.held = held
        self.ledger = Ledger(slots)
        sources = {c: [e.source for e in edges if e.target == c] for c in range(components)}
        self.senders = {e.source for e in edges}
        #: by rank, the components that it reads from
        self.sources = {r: sources[self.component(r)] for r in range(components + stride - 1)}

    def ticks(
        self, warmup: int, steps: int, exact_tail: int, order: tuple[int, ...], time_shift: bool
    ) -> list[Tick]:
        """All ticks. ``order``: of the runs of an exact step."""
        out: list[Tick] = []
        for k in range(warmup):
            out.append(self._exact(len(out), k, order))
        end = steps - exact_tail
        for k in range(warmup, end, self.stride):
            out.append(self._tick(len(out), k, min(k + self.stride, end), int(time_shift)))
        for k in range(end, steps):
            out.append(self._exact(len(out), k, order))
        last = out[-1]
        out[-1] = Tick(last.index, last.exact, last.serves, last.actions + self._empty())
        return out

    def component(self, rank: int) -> int:
        """The component of a rank."""
        return min(rank, self.n - 1)

    def _exact(self, index: int, k: int, order: tuple[int, ...]) -> Tick:
        actions: list[Action] = []
        final = {c: i for i, c in enumerate(order)}
        for i, component in enumerate(order):
            actions += self._catch_up(component)
            delivers = k if component == self.n - 1 and final[component] == i else None
            actions.append(self._run(component, k, k, delivers, sends=True))
        for rank in self.sources:  # copies, and whoever ran before its sources did: hold the newest
            actions += self._catch_up(rank)
        return Tick(index, True, (k,), tuple(actions))

    def _tick(self, index: int, k: int, end: int, shift: int) -> Tick:
        # A last tick with fewer steps left than S serves them with the copies first.
        serves = tuple(range(k, end))
        actions: list[Action] = []
        for rank in self.sources:
            actions += self._catch_up(rank)
        if len(serves) == self.stride:
            time = k + self.stride - 1 - shift
            for rank in range(self.n):
                step = end - 1 if rank == self.n - 1 else None
                actions.append(self._run(rank, k, time, step, sends=True, read=self.held))
        # Else the copies serve what is left, and nobody reads what the others would send.
        for o in range(self.stride - 1):
            if k + o < end:
                time = k + o - shift
                actions.append(self._run(self.n + o, k, time, k + o, sends=False, read=self.held))
        for rank in self.sources:
            actions += self._give_back(rank, keep=self.held - 1)
        return Tick(index, False, serves, tuple(actions))

    def _empty(self) -> tuple[Action, ...]:
        """Take and give back what nobody will read, so that the channels end empty."""
        out: list[Action] = []
        for rank in self.sources:
            out += self._catch_up(rank)
            out += self._give_back(rank)
        return tuple(out)

    def _catch_up(self, rank: int) -> list[Action]:
        """Give back what is older, and take, every bundle sent so far: the newest are held."""
        ledger, out = self.ledger, []
        for source in self.sources[rank]:
            while ledger.taken[rank, source] < ledger.sent[source]:
                if ledger.held(rank, source) >= self.held:
                    out.append(ledger.release(rank, source))
                out.append(ledger.get(rank, source))
        return out

    def _give_back(self, rank: int, keep: int = 0) -> list[Action]:
        """Give back all but the newest ``keep`` bundles."""
        out = []
        for source in self.sources[rank]:
            while self.ledger.held(rank, source) > keep:
                out.append(self.ledger.release(rank, source))
        return out

    def _run(
        self, rank: int, latents: int, time: int, step: int | None, sends: bool, read: int = 1
    ) -> Action:
        component = self.component(rank)
        reads = []
        for s in self.sources[rank]:
            # taken - 1 is the newest bundle held; -1 where none was ever sent (first in a circle)
            newest = self.ledger.taken[rank, s] - 1
            oldest = max(newest - read + 1, min(newest, 0))
            reads += [(s, ordinal) for ordinal in range(newest, oldest - 1, -1)]
        return self.ledger.run(
            rank,
            component,
            latents=latents,
            time=time,
            step=step,
            reads=reads,
            sends=sends and component in self.senders,
        )
