"""A captured denoiser split into N components, and the values that cross between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from ..errors import PartitionError
from ..graph.capture import Captured, nbytes_of
from ..graph.layers.quantized import plain
from ..graph.program import build
from ..schedule.plan import Exchange
from .cost import Costs, estimate
from .links import Links
from .memory import Limits, Use, no_room, of_nodes
from .ownership import Owners, Split, balanced, by_cuts, by_modules
from .report import BoundaryReport, ComponentReport, PartitionReport
from .speeds import relative

#: Between ranks where nothing else is said: NVLink, nearly.
_LINKS = Links.alike(3e8)


@dataclass
class Boundary:
    """The values that component ``source`` sends to ``target``, in order of production."""

    source: int
    target: int
    values: list[fx.Node]

    @property
    def nbytes(self) -> int:
        """Bytes of one bundle, without padding."""
        return sum(nbytes_of(v) for v in self.values)


@dataclass
class Component:
    """What one component computes. ``nodes`` are its own and those that it repeats for itself."""

    index: int
    nodes: list[fx.Node]
    owned: list[fx.Node]
    inputs: list[fx.Node]
    weights: list[str]
    reads: list[Boundary] = field(default_factory=list)
    sends: list[Boundary] = field(default_factory=list)


@dataclass
class Partition:
    """Components, boundaries between them, and the order in which an exact step runs them.
    ``settled``: its components were timed, and it was found that no other cut is better.
    ``speeds``: how fast each component's device is, 1 the fastest; made of the costs, if empty.
    ``limits``: of its memory, and how that is counted."""

    captured: Captured
    components: list[Component]
    boundaries: dict[tuple[int, int], Boundary]
    exact_order: tuple[int, ...]
    cuts: tuple[str, ...] | None
    costs: Costs | None = None
    settled: bool = False
    speeds: list[float] = field(default_factory=list)
    limits: Limits | None = None
    #: what components need, and by which limits that was counted
    _uses: tuple[Limits | None, list[Use]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.speeds and self.costs is not None:
            self.speeds = relative(self.costs, len(self.components))

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """The boundaries as a plan knows them."""
        return tuple(Exchange(i, j) for i, j in self.boundaries)

    def memory(self) -> list[Use]:
        """What each component needs, estimated (:mod:`asyncdiff.partition.memory`)."""
        if self._uses is None or self._uses[0] != self.limits:
            self._uses = self.limits, self._memory()
        return list(self._uses[1])

    def check(self, limits: Limits) -> None:
        """Take ``limits``. Raises MemoryLimitError where what was given does not fit into what the
        user allows, or its weights and mailboxes not into what is free."""
        self.limits = limits
        uses = self.memory()
        if limits.over(uses) and not (limits.free and limits.runs):
            raise no_room([u.total for u in uses], limits, "cut as given they need")

    def _memory(self) -> list[Use]:
        return [
            of_nodes(
                self.captured,
                c.nodes,
                c.weights,
                sum(b.nbytes for b in c.reads),
                sum(b.nbytes for b in c.sends),
                c.inputs,
                self.limits,
            )
            for c in self.components
        ]

    def program(
        self,
        index: int,
        device: torch.device,
        weight: Callable[[str, torch.device], torch.Tensor] | None = None,
    ) -> fx.GraphModule:
        """Component ``index`` as a module on ``device``; see :func:`asyncdiff.program.build`.

        Its arguments are the tensors of ``components[index].inputs``, then of every boundary in
        ``.reads``, in order.
        """
        component = self.components[index]
        sends: dict[fx.Node, list[tuple[int, int]]] = {}
        for boundary in component.sends:
            for i, value in enumerate(boundary.values):
                sends.setdefault(value, []).append((boundary.target, i))
        reads = [v for boundary in component.reads for v in boundary.values]
        last = index == len(self.components) - 1
        return build(
            self.captured,
            component.nodes,
            component.inputs,
            reads,
            sends,
            self.captured.outputs if last else [],
            device,
            weight or self._bring,
        )

    def _bring(self, name: str, device: torch.device) -> torch.Tensor:
        return plain(self.captured.weights[name]).to(device)

    def report(self) -> PartitionReport:
        """What each component costs and what crosses; prints as a table, ``to_dict`` for JSON."""
        costs = self.costs or estimate(self.captured)
        components = []
        for c in self.components:
            paths = [p for p in map(self.captured.module_path, c.owned) if p] or [""]
            run = [n for n in c.nodes if self.captured.each_run(n)]
            times = costs.on(c.index)
            ms, macs = sum(times[n] for n in run), sum(costs.macs[n] for n in run)
            weights = sum(self.captured.weights[w].numel() for w in c.weights)
            components.append(ComponentReport(len(c.nodes), ms, macs, weights, paths[0], paths[-1]))
        boundaries = []
        for (i, j), b in self.boundaries.items():
            # What is pushed after the component's last computation has nothing to hide behind.
            last = self.components[i].owned[-1]
            tail = sum(nbytes_of(v) for v in b.values if v is last)
            boundaries.append(BoundaryReport(i, j, b.nbytes, len(b.values), tail))
        return PartitionReport(
            components,
            boundaries,
            costs.source,
            self.cuts,
            speeds=list(self.speeds),
            memory=self.memory(),
        )


def partition(
    captured: Captured,
    components: int,
    split: Split = "auto",
    *,
    costs: Costs | None = None,
    links: Links = _LINKS,
    copies: int = 1,
    limits: Limits | None = None,
    nbytes: Callable[[fx.Node], int] = nbytes_of,
) -> Partition:
    """Split ``captured`` into ``components`` parts.

    ``split`` is ``"auto"`` (the cut that makes the slowest component fastest under ``costs``,
    estimated ones if None), lists of module paths, or node names at which components begin.
    ``links`` are those between ranks, ``copies`` how many ranks run the last component
    (as many as the stride). ``limits``: bytes that components may need, within which the cut is the
    fastest; a given one is not checked. ``nbytes``: how many bytes cross of a node's value. Raises
    PartitionError where that cannot be done, for memory MemoryLimitError.
    """
    if isinstance(split, str):
        known = costs or estimate(captured)

        def fastest(within: Limits | None) -> Partition:
            starts = balanced(captured, known, components, links, copies, within, nbytes)
            owners = by_cuts(captured, starts)
            return _parts(captured, components, owners, tuple(starts), known, limits)

        made = fastest(None)
        # Where that fits, as it does as a rule, nothing has to be known of other cuts.
        over = limits is not None and limits.over(made.memory())
        return fastest(limits) if over else made
    if all(isinstance(s, str) for s in split):
        cuts = tuple(str(s) for s in split)
        owners = by_cuts(captured, cuts)
        return _parts(captured, components, owners, cuts, costs, limits)
    owners = by_modules(captured, [list(s) for s in split])
    return _parts(captured, components, owners, None, costs, limits)


def _parts(
    captured: Captured,
    components: int,
    owners: Owners,
    cuts: tuple[str, ...] | None,
    costs: Costs | None,
    limits: Limits | None,
) -> Partition:
    """The components that have these owners."""
    outputs = {o for o in captured.outputs if isinstance(o, fx.Node)}
    local, crossing = _close(outputs, owners, components)
    position = {n: i for i, n in enumerate(captured.graph.nodes)}
    parts = []
    for j in range(components):
        nodes = sorted(local[j], key=position.__getitem__)
        used = {s for n in nodes for s in n.all_input_nodes}
        used |= outputs if j == components - 1 else set()
        inputs = [n for n in captured.graph.nodes if n in used and n.name in captured.inputs]
        weights = sorted(n.name for n in used if n.name in captured.weights)
        owned = [n for n in nodes if owners.get(n) == j]
        if not owned:
            raise PartitionError(f"component {j} computes nothing that the result needs")
        parts.append(Component(j, nodes, owned, inputs, weights))
    boundaries = {}
    for i, j in sorted(crossing):
        values = sorted(crossing[i, j], key=position.__getitem__)
        boundaries[i, j] = boundary = Boundary(i, j, values)
        parts[i].sends.append(boundary)
        parts[j].reads.append(boundary)
    order = _exact_order(parts, outputs)
    return Partition(captured, parts, boundaries, order, cuts, costs, limits=limits)


def _close(
    outputs: set[fx.Node], owners: Owners, count: int
) -> tuple[list[set[fx.Node]], dict[tuple[int, int], set[fx.Node]]]:
    """What every component computes, and what crosses, so that the outputs can be computed."""
    local: list[set[fx.Node]] = [set() for _ in range(count)]
    crossing: dict[tuple[int, int], set[fx.Node]] = {}
    todo = [(o, count - 1) for o in outputs]
    while todo:
        node, j = todo.pop()
        if node.op != "call_function" or node in local[j]:
            continue
        owner = owners.get(node, j)
        if owner != j:
            values = crossing.setdefault((owner, j), set())
            if node not in values:
                values.add(node)
                todo.append((node, owner))
            continue
        local[j].add(node)
        todo += [(source, j) for source in node.all_input_nodes]
    return local, crossing


def _exact_order(components: list[Component], outputs: set[fx.Node]) -> tuple[int, ...]:
    """Run order after which every crossing value and the outputs are those of one exact step.

    In a chain this is 0 … N−1. In a circle a component runs again once it has what it lacked.
    """
    sent = [{v for b in c.sends for v in b.values} for c in components]
    sent[-1] |= outputs & set(components[-1].nodes)
    # In a circle a value may be computed by several components; each must have it right.
    right: set[tuple[int, fx.Node]] = set()
    order: list[int] = []
    missing = {(i, v) for i, values in enumerate(sent) for v in values}
    while missing:
        for c in components:
            stale = {v for b in c.reads for v in b.values if (b.source, v) not in right}
            for node in c.nodes:
                if not stale.isdisjoint(node.all_input_nodes):
                    stale.add(node)
            gained = {(c.index, v) for v in sent[c.index] - stale} & missing
            if gained:
                order.append(c.index)
                right |= gained
                missing -= gained
                break
        else:
            raise PartitionError("the components of this split wait for each other in a circle")
    return tuple(order)
