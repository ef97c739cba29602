"""What a denoiser's nodes cost on the devices of its ranks: measured there, then told to all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...graph.capture import Captured
from ...graph.signature import Call
from ...partition.cost import Costs, count_macs, estimate, fused, measure
from ...partition.partition import Partition
from ...partition.rescaled import Measured
from ...partition.speeds import at_speeds, on_kinds, runners, slowest
from ...phases import phase
from ...quiet import undisturbed
from ..devices import Deployment, Place
from .rebalance import corrected


class Profiler:
    """Costs of nodes on the devices of ranks, of which equal ones count as equally fast unless the
    settings say speeds. What was measured at one size serves others where
    components are timed afterwards."""

    def __init__(self, deployment: Deployment) -> None:
        self._weights, self._config = deployment.weights, deployment.config
        self._places, self._team = list(deployment.places), deployment.team
        self._known = Measured()

    @property
    def unequal(self) -> bool:
        """Whether nodes are measured on several devices, because these are of several kinds."""
        return self._config.speeds is None and len({p.kind for p in self._places}) > 1

    def on_each_kind(self, captured: Captured, call: Call) -> dict[str, Costs]:
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

    def of_ranks(
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

    def estimated(self, captured: Captured, components: int, copies: int) -> Costs | None:
        """Estimated costs at the speeds that were given; None: devices count as equally fast."""
        if self._config.speeds is None:
            return None
        ranks = runners(components, copies, len(self._places))
        return at_speeds(estimate(captured), self._config.speeds, ranks)

    def speeds(self, captured: Captured, call: Call, ranks: int) -> Sequence[float] | None:
        """How fast ranks' devices are that have shares of the tokens; None: alike. Collective."""
        each: Sequence[float] | None = self._config.speeds
        if self.unequal and self._config.split == "auto":
            costs = self.on_each_kind(captured, call)
            each = [1 / sum(costs[place.kind].ms.values()) for place in self._places]
        return each and slowest(each, runners(ranks, 1, len(self._places)))

    def learn(self, parts: Partition, times: Sequence[float]) -> None:
        """For other sizes: what nodes cost by the milliseconds that their components took."""
        assert parts.costs is not None
        costs = corrected(parts, parts.costs, times)
        if not (costs.each or costs.busy):
            self._known.keep(self._places[0].kind, parts.captured, costs)

    def _measured(self, captured: Captured, call: Call, place: Place) -> Costs:
        with phase("measure"):
            costs = None
            if self._timed_afterwards:
                costs = self._known.at_other_sizes(place.kind, captured)
            if costs is None:
                with undisturbed():
                    costs = measure(captured, call.tensors, place.device, self._weights.bring)
                costs = fused(captured, costs) if self._config.compile else costs
                self._known.keep(place.kind, captured, costs)
            return costs

    @property
    def _timed_afterwards(self) -> bool:
        """Whether components are timed where they run, which corrects what nodes cost."""
        count = self._config.components
        units = {p.unit for p in self._places[:count]}
        return self._places[0].device.type == "cuda" and len(units) == count
