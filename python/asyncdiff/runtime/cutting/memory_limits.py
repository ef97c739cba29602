"""What each component may take of its devices' memory: what was said, else what is free there."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from ...errors import MemoryLimitError
from ...partition.memory import Limits
from ...partition.partition import Partition
from ...partition.speeds import runners
from ...schedule.plan import Exchange, ring
from ..devices import Deployment, Place, room_for

log = logging.getLogger("asyncdiff")


class MemoryLimits:
    """Limits of components on their ranks' devices, by the settings. What is free is looked
    at once, before the first cut."""

    def __init__(self, deployment: Deployment) -> None:
        self._weights, self._config = deployment.weights, deployment.config
        self._places, self._team = list(deployment.places), deployment.team
        self._own_devices = deployment.own_devices
        #: bytes that are free for each rank, once that was looked at
        self._free: list[int | None] | None = None

    def of(self, components: int, copies: int, places: Sequence[Place] = ()) -> Limits:
        """What each of so many components may need, of which the last has ``copies``. ``places``:
        where they are, if they are another number than the settings'. Collective."""
        config = self._config
        said = [config.memory_of(rank) for rank in range(len(self._places))]
        room = self._room() if None in said else said
        by_rank = [b if a is None else a for a, b in zip(said, room, strict=True)]
        each: list[int | None] = []
        running = runners(components, copies, len(self._places))
        if components != config.components and places:
            here = [next(r for r, p in enumerate(self._places) if p is place) for place in places]
            running = [[here[r] for r in of] for of in runners(components, copies, len(places))]
        for ranks in running:
            known = [room for room in (by_rank[rank] for rank in ranks) if room is not None]
            each.append(min(known, default=None))
        edges = [Exchange(i, j) for i, j in itertools.combinations(range(components), 2)]
        slots = ring(edges, components, config.schedule, config.extrapolate, config.delay)
        engines = components if config.schedule == "pipeline" else 1
        compressed = config.compresses is not None
        return Limits(tuple(each), slots, engines, config.memory is None, compressed=compressed)

    def _room(self) -> list[int | None]:
        """Bytes that are free for each rank, looked at before the first cut. Collective."""
        if self._free is None:
            units = [p.unit for p in self._places]
            if self._places[0].device.type != "cuda":
                self._free = [None] * len(units)
                return self._free

            found = self._team.together(
                "look at memory",
                lambda: [room_for(device, self._weights) for device in self._own_devices],
            )
            each = zip(itertools.chain(*found), units, strict=True)
            # Ranks that share a device share what is free, nobody knows how.
            self._free = [room if units.count(unit) == 1 else None for room, unit in each]
        return self._free


def within(limits: Limits, cut: Callable[[Limits], Partition]) -> Partition:
    """What ``cut`` makes within these limits. What is free may do though estimated activations
    say that it does not: then weights and mailboxes alone decide. Raises MemoryLimitError."""
    try:
        return cut(limits)
    except MemoryLimitError as e:
        if not limits.free:
            raise
        told = e
    made = cut(replace(limits, runs=False))
    made.limits = limits
    log.warning("memory may not suffice: %s", told)
    return made
