"""One component as a torch.fx GraphModule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate, map_arg

from .capture import VIEW, Captured, nbytes_of
from .signature import Role
from .tracing.lazy_code import LazyModule

#: Called with (target component, index in the bundle, value) as soon as a boundary value exists.
Sink = Callable[[int, int, torch.Tensor], None]

#: In the metadata of a program's node: whether its value can be kept, and for how long (ONCE or
#: TIMED). Views are not kept: they cost nothing, and a kept copy of one would.
KEEP = "asyncdiff_keep"
#: It is the same for a whole generation.
ONCE = "once"
#: It is the same for all runs at one timestep.
TIMED = "timed"
#: In the metadata of a node that can be kept: the bytes of its value.
NBYTES = "asyncdiff_nbytes"
#: What else is known of a program's nodes: of which modules they are, and whether they are views.
_KNOWN = ("nn_module_stack", VIEW)


class Emit(nn.Module):
    """Where a program hands out a boundary value: to what :func:`run_program` was given."""

    sink: Sink | None = None

    def forward(self, target: int, index: int, value: torch.Tensor) -> None:
        """Hand ``value`` out; without a sink it is dropped."""
        if self.sink is not None:
            self.sink(target, index, value)


class Meet(nn.Module):
    """Where a program of several ranks, each with a share of the tokens, is given those of all of
    them: by what :func:`run_program` was given, if that has a method ``take``."""

    sink: Sink | None = None

    def forward(
        self, meeting: int, index: int, value: torch.Tensor, dim: int, length: int
    ) -> torch.Tensor:
        """All ranks' values like ``value``, one after another along ``dim``, where they have
        ``length`` together; without anybody to meet, zeros."""
        take = getattr(self.sink, "take", None)
        if take is not None:
            taken: torch.Tensor = take(meeting, index, value, dim)
            return taken
        shape = list(value.shape)
        shape[dim] = length - shape[dim]
        return joined([value, value.new_zeros(shape)], dim, value)


def joined(parts: Sequence[torch.Tensor], dim: int, like: torch.Tensor) -> torch.Tensor:
    """Tensors one after another along ``dim``, as a new one whose dimensions lie in memory in the
    order in which those of ``like`` lie: other ranks' may lie otherwise."""
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda d: (-strides[d], d))
    together = torch.cat([part.permute(order) for part in parts], order.index(dim))
    return together.permute([order.index(d) for d in range(like.dim())])


def run_program(
    program: fx.GraphModule, arguments: Sequence[torch.Tensor], sink: Sink | None
) -> list[Any]:
    """What ``program`` returns for ``arguments``; its boundary values go to ``sink`` meanwhile,
    which in a program of several ranks gives it those of others."""
    emit, meet = program.emit, program._modules.get("meet")
    assert isinstance(emit, Emit)
    emit.sink = sink
    if isinstance(meet, Meet):
        meet.sink = sink
    try:
        outputs: list[Any] = program(*arguments)
        return outputs
    finally:
        emit.sink = None
        if isinstance(meet, Meet):
            meet.sink = None


def resolve(
    node: fx.Node, value: Callable[[fx.Node], Any], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``node`` with values for nodes and ``device`` for the export's own device."""
    args, kwargs = rehome((node.args, node.kwargs), device)
    return map_arg(args, value), map_arg(kwargs, value)


def rehome(aggregate: Any, device: torch.device) -> Any:
    """Replace literal devices, which the exporter froze into the graph."""
    return map_aggregate(aggregate, lambda a: device if isinstance(a, torch.device) else a)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` the current CUDA device meanwhile; nothing for other kinds."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def build(
    captured: Captured,
    nodes: list[fx.Node],
    inputs: list[fx.Node],
    reads: list[fx.Node],
    sends: dict[fx.Node, list[tuple[int, int]]],
    outputs: list[Any],
    device: torch.device,
    weight: Callable[[str, torch.device], torch.Tensor],
) -> fx.GraphModule:
    """The program of one component.

    ``forward`` takes the denoiser's tensor arguments ``inputs``, then the boundary values
    ``reads``, and returns the list of ``outputs``. Each node of ``sends`` is handed to the
    ``emit`` submodule for every (target, index) right after it was computed. ``weight`` brings a
    weight, by placeholder name, to the device.
    """
    root = nn.Module()
    emit = Emit()
    root.add_module("emit", emit)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in [*inputs, *reads]:
        env[node] = graph.placeholder(node.name)
        mark(captured, node, env[node])
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in env:
                env[source] = attribute(captured, source, root, graph, device, weight)
        args, kwargs = resolve(node, env.__getitem__, device)
        env[node] = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        env[node].meta |= {k: node.meta[k] for k in _KNOWN if k in node.meta}
        mark(captured, node, env[node])
        for target, index in sends.get(node, ()):
            graph.call_module("emit", (target, index, env[node]))
    graph.output([env[o] if isinstance(o, fx.Node) else o for o in outputs])
    program = LazyModule(root, graph)
    program.add_module("emit", emit)  # GraphModule keeps only what its graph uses
    return program


def weight_name(placeholder: str) -> str:
    """The attribute of a program that is a weight."""
    return f"w_{placeholder}"


def mark(captured: Captured, node: fx.Node, made: fx.Node) -> None:
    """Say in the metadata of ``made``, the program's ``node``, whether its value can be kept."""
    if node in captured.views or not isinstance(node.meta.get("val"), torch.Tensor):
        return
    index = captured.inputs.get(node.name)
    # The timestep itself too, so that a program which reads it directly needs only its row.
    time = index is not None and captured.signature.inputs[index].role is Role.TIMESTEP
    if time or node in captured.timed or node in captured.once:
        made.meta |= {KEEP: ONCE if node in captured.once else TIMED, NBYTES: nbytes_of(node)}


def attribute(
    captured: Captured,
    source: fx.Node,
    root: nn.Module,
    graph: fx.Graph,
    device: torch.device,
    weight: Callable[[str, torch.device], torch.Tensor],
) -> fx.Node:
    """The node that reads a weight, or the body of a higher-order operation, which ``root`` gets.

    ``source`` is its node in the captured graph, ``weight`` brings a weight to the device.
    """
    name = weight_name(source.name)
    if source.op == "get_attr":  # the body of a higher-order operation
        body = captured.root.get_submodule(str(source.target))
        root.add_module(name, _rehomed_module(body, device))
    else:
        root.register_buffer(name, weight(source.name, device), persistent=False)
    return graph.get_attr(name)


def _rehomed_module(body: nn.Module, device: torch.device) -> nn.Module:
    if not isinstance(body, fx.GraphModule):
        return body
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    for node in graph.nodes:
        node.args, node.kwargs = rehome((node.args, node.kwargs), device)
    return fx.GraphModule(body, graph)
