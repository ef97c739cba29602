"""Takes out of a component's program what need not be computed in every run.

Text keys and values depend on the prompt alone: they are computed when it changes, and kept. Time
embeddings, and what each block makes of them, depend on the timestep, maybe on the prompt too, but
not on the latents: they are computed once for every timestep
(:mod:`asyncdiff.runtime.rows`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from .program import KEEP, NBYTES, ONCE, TIMED
from .row import ROW_BYTES, padded
from .tracing.lazy_code import LazyModule

#: Rows that depend on the conditioning are computed again for each prompt. Where values that depend
#: on both make so much less of the work, they are computed in every run instead.
_LESS = 1 / 10


@dataclass(frozen=True)
class Hoisted:
    """A program in up to three. Weights are shared, not copied.

    ``once`` takes the program's own arguments and returns the list of kept values. ``timed`` takes
    the program's arguments, then the kept values, and returns the values of a row. ``main`` takes
    the program's arguments, the kept values and those of a row. The first two are None where there
    is nothing to keep. ``conditions`` are the names of the arguments, besides the timestep, that
    a row depends on.
    """

    once: fx.GraphModule | None
    timed: fx.GraphModule | None
    main: fx.GraphModule
    conditions: frozenset[str]


def hoist(program: fx.GraphModule, row_bytes: int = ROW_BYTES) -> Hoisted:
    """Split ``program`` into what runs once a generation, once a timestep, and every time.

    Only what later nodes need is kept. Where nearly all of a row is made of the timestep alone, the
    rest of it (of a text's first products, which a block modulates) stays in what runs every time,
    so that rows are right for any prompt. While a row would have more than ``row_bytes``, its
    largest values stay there, too, which then finds the timestep itself in the row.
    """
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    # Ranks meet whether or not they use what they are given.
    meant = [n for n in program.graph.nodes if n.op == "call_module"]
    ends = [*program.graph.find_nodes(op="output"), *meant]
    refused = _spoiling(program, ends)
    while True:
        every_time, needed = _walk(ends, {ONCE, TIMED}, refused)
        row = sorted((n for n in needed if n.meta[KEEP] == TIMED), key=position.__getitem__)
        computed = [n for n in row if n.op != "placeholder"]
        if not computed or sum(padded(n.meta[NBYTES]) for n in row) <= row_bytes:
            break
        # Of equals the last one: two products then give way to what both are made of.
        refused.add(max(computed, key=lambda n: (n.meta[NBYTES], position[n])))
    timed, more = _walk(row, {ONCE}, ())
    kept = sorted((needed - set(row)) | more, key=position.__getitem__)
    if not kept and not row:
        return Hoisted(None, None, program, frozenset())
    once, _ = _walk(kept, (), ())
    main = _module(program, every_time, [*kept, *row], None)
    # GraphModule keeps only what its graph uses.
    main.add_module("emit", program.get_submodule("emit"))
    behind, _ = _walk(row, (), ())
    return Hoisted(
        _module(program, once, [], kept) if kept else None,
        _module(program, timed, kept, row) if row else None,
        main,
        frozenset(
            str(n.target) for n in behind if n.op == "placeholder" and n.meta.get(KEEP) != TIMED
        ),
    )


def store(values: list[torch.Tensor], into: list[torch.Tensor]) -> list[torch.Tensor]:
    """``values`` in memory that stays: copied ``into`` the tensors of an earlier call, if any."""
    if not into:
        return [v.clone(memory_format=torch.preserve_format) for v in values]
    torch._foreach_copy_(into, values)
    return into


def _spoiling(program: fx.GraphModule, ends: Iterable[fx.Node]) -> set[fx.Node]:
    """The values of a row that depend on the conditioning too, where they are but a small part of
    it, by the weights that are read for them; else none."""
    both: set[fx.Node] = set()
    for node in program.graph.nodes:
        given = node.op == "placeholder" and node.meta.get(KEEP) != TIMED
        if given or not both.isdisjoint(node.all_input_nodes):
            both.add(node)
    _, needed = _walk(ends, {ONCE, TIMED}, ())
    behind, _ = _walk([n for n in needed if n.meta[KEEP] == TIMED], {ONCE}, ())
    read = {True: 0, False: 0}
    for node in behind:
        weight = getattr(program, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(weight, torch.Tensor):
            read[not both.isdisjoint(node.users.keys() & behind)] += weight.nbytes
    if read[True] >= _LESS * read[False]:
        return set()
    return {n for n in both if n.op != "placeholder" and n.meta.get(KEEP) == TIMED}


def _walk(
    ends: Iterable[fx.Node], keep: Collection[str], refused: Collection[fx.Node]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes behind ``ends``, these included, and the kept values at which the way back stops:
    those marked with one of ``keep``, unless they are ``refused``."""
    found: set[fx.Node] = set()
    stops: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node in found or node in stops:
            continue
        if node.meta.get(KEEP) in keep and node not in refused:
            stops.add(node)
            continue
        found.add(node)
        stack += node.all_input_nodes
    return found, stops


def _module(
    program: fx.GraphModule,
    nodes: Collection[fx.Node],
    given: Iterable[fx.Node],
    results: Iterable[fx.Node] | None,
) -> fx.GraphModule:
    """The part of ``program`` that ``nodes`` are: it takes the program's arguments and then values
    ``given`` instead of computed, and returns a list of ``results`` (None: what the program
    does)."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        env[node] = graph.node_copy(node, env.__getitem__)
    for node in given:
        env[node] = graph.placeholder(f"kept_{node.name}")
    for node in program.graph.nodes:
        if node in nodes and node not in env:
            env[node] = graph.node_copy(node, env.__getitem__)
    if results is not None:
        graph.output([env[n] for n in results])
    return LazyModule(program, graph)
