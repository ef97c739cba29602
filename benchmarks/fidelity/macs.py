"""Multiply-accumulates of a pipeline's denoiser, for a batch of two conditions of one picture."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.example_inputs import example_inputs
from asyncdiff.graph.signature import parse
from asyncdiff.integrations.diffusers.denoisers import find_denoiser
from asyncdiff.partition.cost import Costs, count_macs
from asyncdiff.partition.links import Links
from asyncdiff.partition.partition import Partition, partition

_captured: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Captured, Costs]]
_captured = weakref.WeakKeyDictionary()


def _of(pipe: Any) -> tuple[Captured, Costs]:
    module = find_denoiser(pipe)
    if module not in _captured:
        inputs = example_inputs(module, scale=getattr(pipe, "vae_scale_factor", 1))
        captured = capture(module, parse(module, (), inputs))
        macs = count_macs(captured)
        # As times: what balances them balances MACs.
        _captured[module] = captured, Costs({n: float(m) for n, m in macs.items()}, macs, "MACs")
    return _captured[module]


def total(pipe: Any) -> int:
    """MACs of one call, without what depends on prompt and timestep alone."""
    return sum(c.macs for c in balanced(pipe, 1).report().components)


def balanced(pipe: Any, components: int) -> Partition:
    """The denoiser split so that the largest component has as few MACs as possible."""
    captured, costs = _of(pipe)
    return partition(captured, components, "auto", costs=costs, links=Links.alike(float("inf")))


def within(pipe: Any, paths: Sequence[str]) -> int:
    """MACs of one call inside the modules at these paths, without what prompt and timestep alone
    decide."""
    captured, costs = _of(pipe)
    prefixes = tuple(f"{path}." for path in paths)
    return sum(
        costs.macs[n]
        for n in captured.nodes
        if captured.each_run(n) and f"{captured.module_path(n)}.".startswith(prefixes)
    )
