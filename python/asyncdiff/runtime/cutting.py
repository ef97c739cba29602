"""Cuts that all processes make alike: process 0 measures and decides, the others are told where."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

import asyncdiff_core as core

from ..config import ParallelConfig
from ..errors import MemoryLimitError
from ..graph.capture import Captured, capture
from ..graph.signature import Call
from ..graph.tracing.symbols import OpenSizes
from ..graph.weights import Weights
from ..partition.cost import Costs, count_macs, estimate, fused, measure
from ..partition.links import Links
from ..partition.memory import Limits
from ..partition.ownership import fit
from ..partition.partition import Partition, partition
from ..partition.rescaled import Measured
from ..partition.shards import Shards, shards
from ..partition.speeds import at_speeds, on_kinds, runners, slowest
from ..phases import phase
from ..preparation.captures import kept_capture
from ..preparation.cuts import KeptCuts
from ..preparation.sizes import Sizes
from ..processes.agreement import of_captured, of_partition
from ..processes.team import Team
from ..quiet import undisturbed
from ..schedule.plan import Exchange, ring
from .devices import Place, room_for
from .exchange.compression.choice import Choice
from .exchange.compression.sent import NOTHING_COMPRESSED, Compressed
from .exchange.link_speed import assumed_links, engine_links, once_measured
from .rebalance import WORTH, WORTH_COMPILING, corrected, next_cut

log = logging.getLogger("asyncdiff")

#: A cut, and the milliseconds of its components.
Timed = tuple[Partition, list[float]]


class Cutter:
    """Cuts ``module`` for ranks at ``places``; ``state`` tells which one it is by now, and
    ``exporting`` is called before it is exported. All methods are collective."""

    def __init__(
        self,
        module: nn.Module,
        weights: Weights,
        config: ParallelConfig,
        places: Sequence[Place],
        team: Team,
        state: Callable[[], int],
        exporting: Callable[[], None],
    ) -> None:
        self._module, self._weights, self._config, self._team = module, weights, config, team
        self._places = list(places)
        self._sizes, self._state, self._exporting = Sizes(module), state, exporting
        self._costs = Measured()
        self._links: Links | None = None
        self._choice = Choice(config.compresses, self._places[0].device.type)
        #: bytes that are free for each rank, once that was looked at
        self._free: list[int | None] | None = None

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
        limits = self._limits(components, copies, places)
        measured = split == "auto" and components > 1
        kinds: dict[str, Costs] = {}
        if measured and self._unequal and not self._known(kept):
            kinds = self._on_each_kind(captured, call)

        def cut() -> Partition:
            costs = None
            if measured:
                costs = kept().costs()
                costs = costs or self._of_ranks(captured, call, kinds, components, copies)
            elif self._config.speeds is not None:
                ranks = runners(components, copies, len(self._places))
                costs = at_speeds(estimate(captured), self._config.speeds, ranks)
            return self._within(limits, lambda room: parted(costs, room))

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
            return self._within(limits, lambda room: parted(parts.costs, room))

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
        speeds = self._speeds(captured, call, ranks)
        with phase("cut"):
            made = shards(captured, ranks, speeds=speeds)
        # Each runs with a share of what the graph says, so that says too much of activations.
        made.check(replace(self._limits(ranks, 1, places), runs=False))
        return made

    def again(self, timed: Sequence[Timed], copies: int) -> Partition | None:
        """What to make in place of the last of the cuts whose components were timed; None to keep
        it. See :func:`~.rebalance.next_cut`."""
        worth = WORTH_COMPILING if self._config.compile else WORTH
        known, links = [parts for parts, _ in timed], self.links()
        kept = self._kept(known[0].captured, len(known[0].components), copies, links)
        limits = self._limits(len(known[0].components), copies)

        def decide() -> Partition | None:
            crossing = self._choice.crossing(known[-1], links, copies)
            better = next_cut(timed, links, copies, worth, limits, crossing)
            last = known[-1] if better is None else better
            if any(last is parts for parts in known):  # nothing is timed after this one
                # A card that is slower now may not be when the next process begins, which looks.
                last.settled = last.costs is None or not last.costs.busy
                kept().keep(last)
                last.settled = True
                self._learn(last, next(ms for parts, ms in timed if parts is last))
            return better

        return self._alike(known[0].captured, decide, known, limits)

    # ---- memory ------------------------------------------------------------------------------

    def _limits(self, components: int, copies: int, places: Sequence[Place] = ()) -> Limits:
        """What each component may need: what was said, else what is free on the devices of its
        ranks."""
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

            here = [p.device for p in self._places if p.process == self._team.process]
            found = self._team.together(
                "look at memory", lambda: [room_for(device, self._weights) for device in here]
            )
            each = zip(itertools.chain(*found), units, strict=True)
            # Ranks that share a device share what is free, nobody knows how.
            self._free = [room if units.count(unit) == 1 else None for room, unit in each]
        return self._free

    def _within(self, limits: Limits, cut: Callable[[Limits], Partition]) -> Partition:
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

    # ---- times -------------------------------------------------------------------------------

    def compressed(self, parts: Partition, copies: int) -> Compressed:
        """Which boundaries cross compressed."""
        if self._config.compresses is None:
            return NOTHING_COMPRESSED
        return self._choice.boundaries(parts, self.links(), copies, self._team)

    @property
    def _unequal(self) -> bool:
        """Whether nodes are measured on several devices, because these are of several kinds."""
        return self._config.speeds is None and len({p.kind for p in self._places}) > 1

    def _speeds(self, captured: Captured, call: Call, ranks: int) -> Sequence[float] | None:
        """How fast ranks' devices are that have shares of the tokens; None: alike. Collective."""
        each: Sequence[float] | None = self._config.speeds
        if self._unequal and self._config.split == "auto":
            costs = self._on_each_kind(captured, call)
            each = [1 / sum(costs[place.kind].ms.values()) for place in self._places]
        return each and slowest(each, runners(ranks, 1, len(self._places)))

    def _known(self, kept: Callable[[], KeptCuts]) -> bool:
        """Whether nothing has to be measured."""
        return self._team.by(0, "look for costs", lambda: kept().costs() is not None)

    def _on_each_kind(self, captured: Captured, call: Call) -> dict[str, Costs]:
        """What nodes cost on the first device of each kind, for all processes. Collective."""
        first: dict[str, Place] = {}
        for place in self._places:
            first.setdefault(place.kind, place)

        def mine() -> list[Any]:
            here = [p for p in first.values() if p.process == self._team.process]
            each = [(p.kind, self._measured(captured, call, p)) for p in here]
            return [(kind, c.source, [c.ms[n] for n in captured.nodes]) for kind, c in each]

        found = self._team.together("measure the denoiser's nodes", mine)
        macs = count_macs(captured)
        return {
            kind: Costs(dict(zip(captured.nodes, ms, strict=True)), macs, source)
            for of_process in found
            for kind, source, ms in of_process
        }

    def _of_ranks(
        self,
        captured: Captured,
        call: Call,
        kinds: Mapping[str, Costs],
        components: int,
        copies: int,
    ) -> Costs:
        """What nodes cost for each component on the devices that run it: by ``kinds``, where these
        are unequal; else measured on the first one, and scaled by speeds that were given."""
        ranks, speeds = runners(components, copies, len(self._places)), self._config.speeds
        if kinds:
            of = [[self._places[rank].kind for rank in mine] for mine in ranks]
            return on_kinds(kinds, self._places[0].kind, of)
        costs = self._measured(captured, call, self._places[0])
        return costs if speeds is None else at_speeds(costs, speeds, ranks)

    def _measured(self, captured: Captured, call: Call, place: Place) -> Costs:
        with phase("measure"):
            costs = None
            if self._timed_afterwards:
                costs = self._costs.at_other_sizes(place.kind, captured)
            if costs is None:
                with undisturbed():
                    costs = measure(captured, call.tensors, place.device, self._weights.bring)
                costs = fused(captured, costs) if self._config.compile else costs
                self._costs.keep(place.kind, captured, costs)
            return costs

    def _learn(self, parts: Partition, times: Sequence[float]) -> None:
        """For other sizes: what nodes cost by the times that their components took."""
        assert parts.costs is not None
        costs = corrected(parts, parts.costs, times)
        if not (costs.each or costs.busy):
            self._costs.keep(self._places[0].kind, parts.captured, costs)

    @property
    def _timed_afterwards(self) -> bool:
        """Whether components are timed where they run, which corrects what nodes cost."""
        count = self._config.components
        units = {p.unit for p in self._places[:count]}
        return self._places[0].device.type == "cuda" and len(units) == count

    def _kept(
        self, captured: Captured, components: int, copies: int, links: Links
    ) -> Callable[[], KeptCuts]:
        """Makes what knows of cuts by earlier processes, in the process that cuts."""
        devices = [p.device for p in self._places if p.process == self._team.process]
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
