"""What a case works with: a world, links, and rounds whose data is checked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from .errors import BenchError
from .figures import Figure
from .links.link import Link
from .payload import Payload, of_size
from .program import Program
from .settings import Settings
from .spread import Spread
from .ways import Way
from .world import World

#: Of a bundle that only tells that something has happened.
_SIGNAL = 16


class Bench:
    """Collective, as the world is. Nothing is begun after ``until``, as time.time() counts."""

    def __init__(self, world: World, settings: Settings, until: float) -> None:
        self.world = world
        self.settings = settings
        self._until = until
        self._seed = 0

    def in_time(self) -> bool:
        """Whether another measurement may be begun."""
        return self.world.gather(time.time() < self._until)[0]

    def link(
        self, way: Way, sender: int, receivers: Sequence[int], payload: Payload, slots: int
    ) -> Link:
        """A link of this way."""
        return way.make()(self.world, sender, receivers, payload, slots)

    def signal(self, way: Way, sender: int, receiver: int) -> Link:
        """A link whose bundles only tell that something has happened."""
        return self.link(way, sender, [receiver], of_size(_SIGNAL), way.least_slots)

    def rounds(
        self, program: Program, links: Sequence[Link], count: int, launch: str, way: Way
    ) -> list[float]:
        """Seconds of each round. All ``links`` carry ``count`` bundles in it; every round sends new
        contents, and what has arrived is compared. Raises BenchError where it differs.
        """
        round_ = self.world.prepare(program, launch, way.joint)
        times = []
        for i in range(self.settings.rounds + 1):
            seed = self.refill(links)
            seconds = round_()
            self.check(links, seed, count)
            if i:  # the first one warms up
                times.append(seconds)
        return times

    def refill(self, links: Sequence[Link]) -> int:
        """New contents for all links; returns their seed."""
        self._seed += 1
        for link in links:
            link.refill(self._seed)
        self.world.synchronize()
        return self._seed

    def check(self, links: Sequence[Link], seed: int, count: int) -> None:
        """Raise BenchError, in all processes, if other bytes arrived than were sent."""
        whole = all(link.arrived_whole(seed, count) for link in links)
        if not all(self.world.gather(whole)):
            raise BenchError("wrong data arrived")


def count_for(payload: Payload, launch: str) -> int:
    """Bundles in a round: enough for the clock; a multiple of four, so of every number of slots in
    use. Eager rounds of many tensors have to fit into a stream's queue of about a thousand
    operations, of which NCCL takes several a tensor."""
    limits = ((256 << 10, 32), (4 << 20, 16), (16 << 20, 8))
    count = next((n for size, n in limits if payload.nbytes <= size), 4)
    return min(count, 4) if launch == "eager" and len(payload.specs) > 4 else count


def figure(
    case: str,
    way: Way,
    launch: str,
    payload: Payload,
    metric: str,
    values: Sequence[float],
    unit: str = "µs",
    *,
    moved: int = 0,
    **details: Any,
) -> Figure:
    """A figure from the values of all rounds."""
    return Figure(
        case,
        way.key,
        launch,
        payload.name,
        payload.nbytes,
        len(payload.specs),
        metric,
        unit,
        Spread.of(values),
        moved,
        {k: v for k, v in details.items() if v is not None},
    )
