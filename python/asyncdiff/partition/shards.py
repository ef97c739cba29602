"""A captured denoiser whose tokens are shared out among ranks, each of which has all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx

from ..errors import TokensError
from ..graph.capture import Captured
from ..sequence.axis import Axis
from ..sequence.checking import HINT, Check
from ..sequence.module import rank_module
from ..sequence.nodes import operation
from ..sequence.program import program
from ..sequence.sharding import Sharding, shard
from ..sequence.shares import Decide, Shares, joint
from .cost import Costs, estimate
from .partition import Component, Partition
from .report import ComponentReport, PartitionReport
from .speeds import at_speeds

#: Milliseconds, as estimates count them, that a matrix product of few rows takes with what follows
#: it. On an H200 a rank with all of the text took 1.6 ms longer than one with as many other tokens
#: for the 138 of SD3, which is what 485 of its tokens take, and 1.5 ms for the 114 of FLUX, or 60.
_PRODUCT_MS = 0.022
#: Of the multiply-accumulates of a step, what has to be shared out: else ranks mostly do the same.
_SHARED = 0.5


@dataclass
class Shards(Partition):
    """Ranks as if they were components: each has all nodes, for its share of the tokens, and
    returns the whole result. Nothing crosses between them but where tokens meet."""

    sharding: Sharding = field(default_factory=Sharding)
    shares: Shares = field(default_factory=lambda: Shares(1))

    def program(
        self,
        index: int,
        device: torch.device,
        weight: Callable[[str, torch.device], torch.Tensor] | None = None,
    ) -> fx.GraphModule:
        """The program of rank ``index``; see :func:`asyncdiff.sequence.module.rank_module`."""
        return rank_module(
            self.captured,
            self.sharding,
            index,
            self.shares,
            self.components[index].inputs,
            device,
            weight or self._bring,
        )

    def report(self) -> PartitionReport:
        """What each rank computes; prints as a table, ``to_dict`` for JSON."""
        costs = self.costs or estimate(self.captured)
        run = [n for n in self.captured.nodes if self.captured.each_run(n)]
        reports = []
        for c in self.components:
            parts = {n: _part(self.sharding, n, c.index, self.shares) for n in run}
            ms = sum(costs.on(c.index)[n] * part for n, part in parts.items())
            macs = round(sum(costs.macs[n] * part for n, part in parts.items()))
            weights = sum(self.captured.weights[w].numel() for w in c.weights)
            paths = [p for p in map(self.captured.module_path, run) if p] or [""]
            mine = sum(part > 0 for part in parts.values())
            reports.append(ComponentReport(mine, ms, macs, weights, paths[0], paths[-1]))
        whole = sum(costs.ms[n] for n in run)
        speeds = list(self.speeds)
        return PartitionReport(reports, [], costs.source, None, whole, speeds, self.memory())


def shards(
    captured: Captured,
    ranks: int,
    costs: Costs | None = None,
    decide: Decide = joint,
    speeds: Sequence[float] | None = None,
) -> Shards:
    """``captured`` with its tokens shared out among so many ranks. ``costs``: for its report
    (None: estimated). ``decide``: how many of each stream each rank has. ``speeds``: how fast the
    ranks' devices are, relative to each other, which ``joint`` goes by (None: alike).

    Raises TokensError for a denoiser in which tokens cannot be followed, or of which too much
    would be computed by each rank, saying by which operations; and where there are too few tokens.
    """
    sharding = shard(captured)
    _check(captured, sharding)
    longest = sharding.longest()
    assert longest is not None
    if speeds is not None:
        costs = at_speeds(costs or estimate(captured), speeds, [[rank] for rank in range(ranks)])
        decide = partial(joint, speeds=speeds)
    shares = decide(longest.segments, ranks, _fixed(captured, sharding, longest))
    if len(longest.owners(shares)) < ranks:
        raise TokensError(
            f"{longest.length} tokens cannot be shared out among {ranks} ranks: take fewer "
            f"devices, or {HINT}"
        )
    used = {s for n in captured.nodes for s in n.all_input_nodes}
    used |= {o for o in captured.outputs if isinstance(o, fx.Node)}
    inputs = [n for n in captured.graph.nodes if n in used and n.name in captured.inputs]
    nodes = list(captured.nodes)
    weights = _weights(captured, sharding, shares)
    parts = [Component(r, nodes, nodes, inputs, weights[r]) for r in range(ranks)]
    order = tuple(range(ranks))
    return Shards(captured, parts, {}, order, None, costs, True, sharding=sharding, shares=shares)


def _fixed(captured: Captured, sharding: Sharding, longest: Axis) -> dict[int, int]:
    """What a rank that has any tokens of a stream computes for it at least, in tokens of the
    longest sequence: by the matrix products that are of this stream alone. For ``joint``."""
    costs = estimate(captured)
    run = [n for n in captured.nodes if captured.each_run(n) and n in sharding.axes]
    per_token = sum(costs.ms[n] for n in run) / longest.length
    products = Counter(
        axis.segments[0]
        for n in run
        if costs.macs[n] and (axis := sharding.axis(n)) is not None and len(axis.segments) == 1
    )
    return {n: round(products[n] * _PRODUCT_MS / max(per_token, 1e-9)) for n in longest.segments}


def _weights(captured: Captured, sharding: Sharding, shares: Shares) -> list[list[str]]:
    """Those that each rank computes with: not those of streams of which it has no tokens. Raises
    TokensError where a rank's program would not make its share of what the denoiser does."""
    streams = {length for axis in sharding.every_axis() for length in axis.segments}
    found: dict[tuple[bool, ...], list[str]] = {}
    check = Check()
    out = []
    for rank in range(shares.ranks):
        has = tuple(Axis(0, (length,)).local(rank, shares) > 0 for length in streams)
        if has not in found:
            graph = program(captured, sharding, rank, shares, lambda local, _: local, check)
            places = graph.find_nodes(op="placeholder")
            found[has] = sorted(n.name for n in places if n.users and n.name in captured.weights)
        out.append(found[has])
    return out


def _check(captured: Captured, sharding: Sharding) -> None:
    unknown = ", ".join(dict.fromkeys(map(operation, sharding.unknown)))
    if not sharding.attention:
        ends = f" (they end at {unknown})" if unknown else ""
        raise TokensError(
            "the denoiser's tokens cannot be shared out among ranks: there is no attention between "
            f"tokens that could be followed to what they are made of{ends}; {HINT}"
        )
    costs: Costs = estimate(captured)
    run = [n for n in captured.nodes if captured.each_run(n)]
    whole = sum(costs.macs[n] for n in run)
    mine = sum(costs.macs[n] for n in run if _part(sharding, n, 0, Shares(2)) < 1)
    if mine < _SHARED * whole:
        unknown = unknown or "none by name"
        raise TokensError(
            f"of the denoiser's work {100 * mine / max(whole, 1):.0f} % could be shared out among "
            f"ranks by tokens; it ends at operations through which tokens are not followed "
            f"({unknown}); {HINT}"
        )


def _part(sharding: Sharding, node: fx.Node, rank: int, shares: Shares) -> float:
    """The share of a node's work that a rank does."""
    axes = sharding.axes.get(node)
    axis = next((a for a in axes if a), None) if isinstance(axes, list) else axes
    if axis is None or node in sharding.entries:
        return 1.0
    return axis.local(rank, shares) / max(axis.length, 1)
