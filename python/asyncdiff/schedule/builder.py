"""What both schedules share: exact steps at both ends, and the count of bundles in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

from .actions import NOTHING, Action, Bundle, Exchange, Kind, Tick


class Builder(ABC):
    """Writes the ticks of one plan, and counts what every rank has taken from, and given back to,
    every component, and what was sent.

    ``components``: by rank. The n-th bundle of a component lies in slot n modulo ``slots`` of all
    its receivers' mailboxes.
    """

    def __init__(
        self, components: Sequence[int], exchanges: Sequence[Exchange], slots: int
    ) -> None:
        self.components = components
        self.last = max(components)
        self.slots = slots
        self.senders = {e.source for e in exchanges}
        #: by rank, the components that it reads from
        self.sources = [[e.source for e in exchanges if e.target == c] for c in components]
        #: bundles sent so far, by component
        self.sent: Counter[int] = Counter()
        #: bundles taken and given back so far, by (rank, sending component)
        self.taken: Counter[tuple[int, int]] = Counter()
        self.freed: Counter[tuple[int, int]] = Counter()
        self._actions: list[Action] = []
        self._ticks: list[Tick] = []

    @abstractmethod
    def exact(self, k: int) -> None:
        """Write the tick of an exact step."""

    @abstractmethod
    def asynchronous(self, steps: range, more: bool) -> None:
        """Write the ticks of these steps. ``more``: whether exact ones follow."""

    def ticks(self, warmup: int, steps: int, exact_tail: int) -> tuple[Tick, ...]:
        """All ticks of a generation."""
        for k in range(warmup):
            self.exact(k)
        self.asynchronous(range(warmup, steps - exact_tail), more=exact_tail > 0)
        for k in range(steps - exact_tail, steps):
            self.exact(k)
        # What nobody will read is taken and given back, so that the channels end empty.
        for rank, sources in enumerate(self.sources):
            for source in sources:
                self.take(rank, source, self.sent[source])
            for source in sources:
                self.give_back(rank, source, self.sent[source])
        last = self._ticks.pop()
        self._actions = [*last.actions, *self._actions]
        self.tick(last.exact, last.serves)
        return tuple(self._ticks)

    def tick(self, exact: bool, serves: Sequence[int]) -> None:
        """End a tick: what was written since the last one is its actions."""
        self._ticks.append(Tick(len(self._ticks), exact, tuple(serves), tuple(self._actions)))
        self._actions = []

    def take(self, rank: int, source: int, end: int, keep: int = 1) -> None:
        """The rank takes the bundles before ordinal ``end``, and gives back what is older than the
        newest ``keep``."""
        while self.taken[rank, source] < end:
            self.give_back(rank, source, self.taken[rank, source] - keep + 1)
            self._exchange(Kind.GET, self.taken, rank, source)

    def give_back(self, rank: int, source: int, end: int) -> None:
        """The rank gives back those that it holds of the bundles before ordinal ``end``."""
        while self.freed[rank, source] < min(end, self.taken[rank, source]):
            self._exchange(Kind.RELEASE, self.freed, rank, source)

    def run(
        self,
        rank: int,
        latents: int,
        time: int,
        step: int | None,
        reads: Sequence[tuple[int, int]],
        sends: bool = True,
    ) -> None:
        """The rank runs its component, on bundles by source and ordinal, and sends one if anybody
        reads it."""
        component = self.components[rank]
        ordinal = slot = NOTHING
        if sends and component in self.senders:
            ordinal = self.sent[component]
            slot = ordinal % self.slots
            self.sent[component] += 1
        # Ordinal -1, the first run in a circle: any slot, which holds zeros.
        bundles = tuple(Bundle(s, o, max(o, 0) % self.slots) for s, o in reads)
        self._actions.append(
            Action(Kind.RUN, rank, component, ordinal, slot, latents, time, step, bundles)
        )

    def _exchange(
        self, kind: Kind, counts: Counter[tuple[int, int]], rank: int, source: int
    ) -> None:
        ordinal = counts[rank, source]
        counts[rank, source] += 1
        self._actions.append(Action(kind, rank, source, ordinal, ordinal % self.slots))
