"""Cuts that all processes make alike: process 0 measures and decides, the others are told where."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import asyncdiff_core as core

from ...graph.capture import Captured, capture
from ...graph.signature import Call
from ...graph.tracing.symbols import OpenSizes
from ...partition.cost import Costs
from ...partition.links import Links
from ...partition.memory import Limits
from ...partition.ownership import fit
from ...partition.partition import Partition, partition
from ...partition.shards import Shards, shards
from ...phases import phase
from ...preparation.captures import kept_capture
from ...preparation.cuts import KeptCuts
from ...preparation.sizes import Sizes
from ...processes.agreement import of_captured, of_partition
from ...quiet import undisturbed
from ..devices import Deployment, Place
from ..exchange.compression.choice import Choice
from ..exchange.compression.sent import NOTHING_COMPRESSED, Compressed
from .link_speed import assumed_links, engine_links, once_measured
from .memory_limits import MemoryLimits, within
from .profiler import Profiler
from .rebalance import WORTH, WORTH_COMPILING, next_cut

log = logging.getLogger("asyncdiff")

#: A cut, and the milliseconds of its components.
Timed = tuple[Partition, list[float]]


class Cutter:
    """Cuts a denoiser for its ranks; ``state`` tells which denoiser it is by now, and ``exporting``
    is called before it is exported. All methods are collective."""

    def __init__(
        self, deployment: Deployment, state: Callable[[], int], exporting: Callable[[], None]
    ) -> None:
        self._module, self._weights = deployment.module, deployment.weights
        self._config, self._team = deployment.config, deployment.team
        self._places, self._own_devices = list(deployment.places), deployment.own_devices
        self._sizes, self._state, self._exporting = Sizes(self._module), state, exporting
        self._profiler = Profiler(deployment)
        self._limits = MemoryLimits(deployment)
        self._links: Links | None = None
        self._choice = Choice(self._config.compresses, self._places[0].device.type)

    def first(
        self,
        call: Call,
        components: int,
        copies: int,
        like: Partition | None = None,
        places: Sequence[Place] = (),
    ) -> Partition:
        """The denoiser, for calls like this one, in so many components, of which the last has
        ``copies``: by what nodes cost, as the settings say. ``like``: cut there, if it can be; for
        calls of the same signature nothing is exported again. ``places``: where it will be in
        another number of components than the settings', for exact steps."""
        config = self._config
        known = like is not None and like.captured.signature == call.signature
        captured = like.captured if like is not None and known else self._capture(call)
        split = config.split if components == config.components else "auto"
        if like is not None and len(like.components) == components:
            if known:
                return like
            if like.cuts and fit(captured, like.cuts):
                split = list(like.cuts)
        # An estimate is the same in every run, and so is the cut that comes of it.
        alike = split == "estimate" and config.compresses != "auto" and not core.simulated_link()
        links = assumed_links(self._places) if alike else self.links()
        kept = self._kept(captured, components, copies, links)
        limits = self._limits.of(components, copies, places)
        measured = split == "auto" and components > 1
        kinds: dict[str, Costs] = {}
        if measured and self._profiler.unequal and not self._known(kept):
            kinds = self._profiler.on_each_kind(captured, call)

        def cut() -> Partition:
            if measured:
                costs = kept().costs()
                costs = costs or self._profiler.of_ranks(captured, call, kinds, components, copies)
            else:
                costs = self._profiler.estimated(captured, components, copies)
            return within(limits, lambda room: parted(costs, room))

        def parted(costs: Costs | None, room: Limits | None) -> Partition:
            with phase("cut"):
                return self._choice.cut(
                    captured,
                    components,
                    split,
                    costs=costs,
                    links=links,
                    copies=copies,
                    limits=room,
                )

        def found() -> Partition:
            """The one that is kept, unless there is less memory now."""
            parts = kept().get(cut)
            parts.limits = limits
            if limits is None or not limits.over(parts.memory()):
                return parts
            return within(limits, lambda room: parted(parts.costs, room))

        if isinstance(split, str):
            made = self._alike(captured, found if measured else cut, limits=limits)
            assert made is not None
            return made
        made = cut()
        made.check(limits)
        self._team.agree("cut the denoiser", lambda: of_partition(made))
        return made

    def shards(
        self, call: Call, ranks: int, like: Partition | None = None, places: Sequence[Place] = ()
    ) -> Shards:
        """The denoiser, for calls like this one, with its tokens shared out among so many ranks, at
        ``places``. ``like``: what is exported already, if that is for the same signature."""
        known = like is not None and like.captured.signature == call.signature
        captured = like.captured if like is not None and known else self._capture(call)
        if known and isinstance(like, Shards) and len(like.components) == ranks:
            return like
        speeds = self._profiler.speeds(captured, call, ranks)
        with phase("cut"):
            made = shards(captured, ranks, speeds=speeds)
        # Each runs with a share of what the graph says, so that says too much of activations.
        made.check(replace(self._limits.of(ranks, 1, places), runs=False))
        return made

    def again(self, timed: Sequence[Timed], copies: int) -> Partition | None:
        """What to make in place of the last of the cuts whose components were timed; None to keep
        it. See :func:`~.rebalance.next_cut`."""
        worth = WORTH_COMPILING if self._config.compile else WORTH
        known, links = [parts for parts, _ in timed], self.links()
        kept = self._kept(known[0].captured, len(known[0].components), copies, links)
        limits = self._limits.of(len(known[0].components), copies)

        def decide() -> Partition | None:
            crossing = self._choice.crossing(known[-1], links, copies)
            better = next_cut(timed, links, copies, worth, limits, crossing)
            last = known[-1] if better is None else better
            if any(last is parts for parts in known):  # nothing is timed after this one
                # A card that is slower now may not be when the next process begins, which looks.
                last.settled = last.costs is None or not last.costs.busy
                kept().keep(last)
                last.settled = True
                self._profiler.learn(last, next(ms for parts, ms in timed if parts is last))
            return better

        return self._alike(known[0].captured, decide, known, limits)

    def compressed(self, parts: Partition, copies: int) -> Compressed:
        """Which boundaries cross compressed."""
        if self._config.compresses is None:
            return NOTHING_COMPRESSED
        return self._choice.boundaries(parts, self.links(), copies, self._team)

    def _known(self, kept: Callable[[], KeptCuts]) -> bool:
        """Whether nothing has to be measured."""
        return self._team.by(0, "look for costs", lambda: kept().costs() is not None)

    def _kept(
        self, captured: Captured, components: int, copies: int, links: Links
    ) -> Callable[[], KeptCuts]:
        """Makes what knows of cuts by earlier processes, in the process that cuts."""
        devices = self._own_devices
        units = [f"{p.unit} of host {p.host}" for p in self._places]
        compiled = "regions" if self._config.compile is True else self._config.compile or False
        settings: list[Any] = [compiled, self._config.speeds, self._config.memory]
        if self._config.compresses is not None:
            settings.append(self._config.compresses)
        if len({p.kind for p in self._places}) > 1:
            settings.append([p.kind for p in self._places])
        return functools.cache(
            lambda: KeptCuts(captured, components, copies, devices, units, settings, links)
        )

    def _capture(self, call: Call) -> Captured:
        made: list[Captured] = []

        def export() -> None:
            state = self._state()
            made.append(
                kept_capture(
                    self._module, call, lambda: self._sizes.capture(call, state, self._exported)
                )
            )
            self._sizes.saw(made[0], state)

        self._team.together("export the denoiser", export)
        self._team.agree("cut the denoiser", lambda: of_captured(made[0]))
        return made[0]

    def _exported(self, call: Call, *sizes: OpenSizes) -> Captured:
        self._exporting()
        # The exporter switches kernels of CPUs off meanwhile, for the whole process.
        others = self._weights.home.type == "cpu"
        with undisturbed() if others else contextlib.nullcontext():
            return capture(self._module, call, *sizes)

    def _alike(
        self,
        captured: Captured,
        cut: Callable[[], Partition | None],
        known: Sequence[Partition] = (),
        limits: Limits | None = None,
    ) -> Partition | None:
        """What ``cut`` returns in process 0, in all; of the ``known`` ones, that which it was."""
        made: list[Partition | None] = []

        def decide() -> tuple[list[str], bool, list[float]] | None:
            made.append(cut())
            first = made[0]
            return None if first is None else (list(first.cuts or ()), first.settled, first.speeds)

        decided = self._team.by(0, "cut the denoiser", decide)
        if decided is None:
            return None
        cuts, settled, speeds = decided
        if not made or made[0] is None:
            same = (parts for parts in known if parts.cuts == tuple(cuts))
            made = [next(same, None) or partition(captured, len(cuts) + 1, cuts or "estimate")]
        parts = made[0]
        assert parts is not None
        parts.settled, parts.speeds, parts.limits = settled, speeds, limits
        self._team.agree("cut the denoiser", lambda: of_partition(parts))
        return parts

    def links(self) -> Links:
        """The links between ranks, measured once."""
        if self._links is None:
            self._links = once_measured(self._places, self._team, engine_links)
        return self._links
