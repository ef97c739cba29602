"""Objects that hold tensors, among what a denoiser is given and what it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from asyncdiff.graph.capture import capture
from asyncdiff.graph.layers.containers import register_containers
from asyncdiff.graph.signature import parse


class Layer:
    def __init__(self, key: torch.Tensor) -> None:
        self.key = key


class Cache:
    def __init__(self, layers: list[Layer]) -> None:
        self.layers, self.count = layers, len(layers)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, sample: Any, timestep: Any, cache: Cache | None = None) -> Any:
        if cache is None:
            return self.mix(sample) * timestep, Cache([Layer(self.mix(sample)), Layer(sample * 2)])
        return (sum(layer.key for layer in cache.layers) + sample,)


def test_what_one_call_returns_the_next_is_given() -> None:
    module, x, t = Denoiser().eval(), torch.randn(2, 4), torch.tensor(3.0)
    first = capture(module, parse(module, (x, t), {}))
    result = first.unflatten([x if isinstance(o, fx.Node) else o for o in first.outputs])
    cache = result[1]
    assert type(cache) is Cache and type(cache.layers[1]) is Layer and cache.count == 2
    call = parse(module, (x, t, cache), {})
    names = [x.name for x in call.signature.inputs]
    assert names == ["sample", "timestep", "cache.layers.0.key", "cache.layers.1.key"]
    assert len(capture(module, call).inputs) == 4


def test_other_objects_are_none() -> None:
    class Plain:
        number = 3

    assert not register_containers([Plain(), 3, "text", torch.ones(2), nn.Linear(2, 2), Cache])
