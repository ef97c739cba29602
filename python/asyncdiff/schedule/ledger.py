"""The count of bundles while a plan is built: which one comes next, and in which slot it lies."""

from __future__ import annotations

from collections import Counter

from .actions import NOTHING, Action, Bundle, Kind


class Ledger:
    """What every rank has taken from, and given back to, every component, and what was sent.

    The n-th bundle of a component lies in slot n modulo ``slots`` of all its receivers' mailboxes.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        #: bundles sent so far, by component
        self.sent: Counter[int] = Counter()
        #: bundles taken and given back so far, by (rank, sending component)
        self.taken: Counter[tuple[int, int]] = Counter()
        self.freed: Counter[tuple[int, int]] = Counter()

    def held(self, rank: int, source: int) -> int:
        """How many bundles of ``source`` a rank holds."""
        return self.taken[rank, source] - self.freed[rank, source]

    def get(self, rank: int, source: int) -> Action:
        """The rank takes the next bundle."""
        return self._exchange(Kind.GET, self.taken, rank, source)

    def release(self, rank: int, source: int) -> Action:
        """The rank gives its oldest bundle back."""
        return self._exchange(Kind.RELEASE, self.freed, rank, source)

    def run(
        self,
        rank: int,
        component: int,
        *,
        latents: int,
        time: int,
        step: int | None,
        reads: list[tuple[int, int]],
        sends: bool,
    ) -> Action:
        """The rank runs ``component``, on bundles by source and ordinal, and maybe sends one."""
        ordinal = slot = NOTHING
        if sends:
            ordinal = self.sent[component]
            slot = ordinal % self.slots
            self.sent[component] += 1
        # Ordinal -1, the first run in a circle: any slot, which holds zeros.
        bundles = tuple(Bundle(s, o, max(o, 0) % self.slots) for s, o in reads)
        return Action(Kind.RUN, rank, component, ordinal, slot, latents, time, step, bundles)

    def _exchange(
        self, kind: Kind, counts: Counter[tuple[int, int]], rank: int, source: int
    ) -> Action:
        ordinal = counts[rank, source]
        counts[rank, source] += 1
        return Action(kind, rank, source, ordinal, ordinal % self.slots)
