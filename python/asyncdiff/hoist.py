"""Takes out of a component's program what stays the same for a whole generation.

Text keys and values depend on the prompt alone: they are computed when it changes, and kept.
"""

from __future__ import annotations

import torch
from torch import fx

from .program import ONCE


def hoist(program: fx.GraphModule) -> tuple[fx.GraphModule | None, fx.GraphModule]:
    """Split ``program`` into what runs once a generation and what runs every time.

    The first takes the program's own arguments and returns a list of kept values; None where there
    is nothing to keep. The second takes the program's arguments and then the kept values. Weights
    are shared, not copied.
    """
    kept: dict[fx.Node, None] = {}  # in order of their first use
    every_time: set[fx.Node] = set()
    (output,) = program.graph.find_nodes(op="output")
    stack = [output, *program.graph.find_nodes(op="call_module", target="emit")]
    while stack:
        node = stack.pop()
        if node in every_time:
            continue
        if node.meta.get(ONCE):
            kept[node] = None
            continue
        every_time.add(node)
        stack += node.all_input_nodes
    if not kept:
        return None, program

    once: set[fx.Node] = set()
    stack = list(kept)
    while stack:
        node = stack.pop()
        if node not in once:
            once.add(node)
            stack += node.all_input_nodes

    first = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" or node in once:
            env[node] = first.node_copy(node, env.__getitem__)
    first.output([env[n] for n in kept])

    second = fx.Graph()
    env = {}
    for node in program.graph.find_nodes(op="placeholder"):
        env[node] = second.node_copy(node, env.__getitem__)
    for node in kept:
        env[node] = second.placeholder(f"kept_{node.name}")
    for node in program.graph.nodes:
        if node in every_time and node.op != "placeholder":
            env[node] = second.node_copy(node, env.__getitem__)
    main = fx.GraphModule(program, second)
    main.add_module(
        "emit", program.get_submodule("emit")
    )  # GraphModule keeps only what its graph uses
    return fx.GraphModule(program, first), main


def store(values: list[torch.Tensor], into: list[torch.Tensor]) -> list[torch.Tensor]:
    """``values`` in memory that stays: copied ``into`` the tensors of an earlier call, if any."""
    if not into:
        return [v.clone(memory_format=torch.preserve_format) for v in values]
    for old, new in zip(into, values, strict=True):
        old.copy_(new)
    return into
