"""The published algorithm, written as plainly as it can be: one device, no plan, no channels.

An independent oracle: it evaluates the captured graph node by node, and knows of a partition only
which component owns which node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from asyncdiff.graph.capture import Captured
from asyncdiff.graph.program import resolve
from asyncdiff.graph.signature import Call, Role
from asyncdiff.partition.ownership import Owners

Values = dict[fx.Node, Any]
Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def evaluate(
    captured: Captured,
    owners: Owners,
    component: int | None,
    call: Call,
    latents: torch.Tensor,
    time: torch.Tensor,
    stale: Values,
    wanted: Sequence[fx.Node] = (),
) -> tuple[Any, Values]:
    """The first output (of the last of ``wanted``, if any) and all values as ``component`` sees
    them: values that others own come from ``stale``. ``component=None`` computes everything."""
    inputs = captured.signature.inputs
    values: Values = {}

    def value(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        owner = owners.get(node)
        if component is not None and owner is not None and owner != component:
            return stale[node]
        if node.op == "placeholder":
            if node.name in captured.weights:
                return captured.weights[node.name]
            index = captured.inputs[node.name]
            role = inputs[index].role
            if role is Role.LATENTS:
                return latents
            return time if role is Role.TIMESTEP else call.tensors[index]
        args, kwargs = resolve(node, value, torch.device("cpu"))
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return values[node]

    out = None
    for node in wanted or captured.outputs[:1]:
        out = value(node)
    return out, values


def generate(
    captured: Captured,
    owners: Owners,
    components: int,
    stride: int,
    warmup: int,
    times: list[torch.Tensor],
    call: Call,
    latents: torch.Tensor,
    step: Step,
    time_shift: bool = False,
) -> torch.Tensor:
    """The final latents; ``step(latents, noise, k)`` is the sampler."""
    stale: Values = {}
    steps, shift = len(times), 1 if time_shift else 0
    for k in range(warmup):
        noise, stale = evaluate(captured, owners, None, call, latents, times[k], {})
        latents = step(latents, noise, k)
    k = warmup
    while k < steps:
        lead = k + stride - 1 if k + stride - 1 <= steps - 1 else k
        fresh: Values = {}
        noises = {}
        for c in range(components):
            out, values = _component(
                captured, owners, c, components, call, latents, times[lead - shift], stale
            )
            fresh |= {n: v for n, v in values.items() if owners.get(n) == c}
            if c == components - 1:
                noises[k + stride - 1] = out
        for o in range(stride - 1):
            if k + o < steps:
                noises[k + o], _ = evaluate(
                    captured, owners, components - 1, call, latents, times[k + o - shift], stale
                )
        for j in range(k, min(k + stride, steps)):
            latents = step(latents, noises[j], j)
        stale = fresh
        k += stride
    return latents


def _component(
    captured: Captured,
    owners: Owners,
    component: int,
    components: int,
    call: Call,
    latents: torch.Tensor,
    time: torch.Tensor,
    stale: Values,
) -> tuple[torch.Tensor | None, Values]:
    """What a component computes: for the last one the output, for others all that they own."""
    owned = [node for node in captured.nodes if owners.get(node) == component]
    last = component == components - 1
    out, values = evaluate(
        captured, owners, component, call, latents, time, stale,
        [*owned, captured.outputs[0]] if last else owned,
    )  # fmt: skip
    return out if last else None, values


class Waves:
    """Evaluations of waves whose delay is shorter than N − 1, in the order in which they start.

    Component c runs min(c, delay) ticks after a wave starts. It finds the wave's own values of
    components that run before it, and of those that run at once with it the ones of the wave (or
    exact step) before.
    """

    def __init__(
        self, captured: Captured, owners: Owners, components: int, delay: int, call: Call
    ) -> None:
        self._captured, self._owners, self._call = captured, owners, call
        self._components, self._delay = components, delay
        self._before: Values = {}

    def exact(self, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The output of an exact step."""
        out, self._before = evaluate(
            self._captured, self._owners, None, self._call, latents, time, {}
        )
        return out

    def wave(self, latents: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The output of a wave."""
        fresh: Values = {}
        out = None
        for c in range(self._components):
            earlier = range(min(c, self._delay)) if c < self._delay else range(self._delay)
            seen = self._before | {n: v for n, v in fresh.items() if self._owners[n] in earlier}
            out, values = _component(
                self._captured, self._owners, c, self._components, self._call, latents, time, seen
            )
            fresh |= {n: v for n, v in values.items() if self._owners.get(n) == c}
        self._before = fresh
        assert out is not None
        return out
