"""What nodes cost at sizes at which they were not measured."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from toys import Toy, toy, toy_call

from asyncdiff import AsyncDenoiser
from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.signature import parse
from asyncdiff.partition.cost import Costs, estimate
from asyncdiff.partition.rescaled import Measured
from asyncdiff.runtime.cutting import profiler


def _captured(module: Any, **sizes: int) -> Captured:
    return capture(module, parse(module, (), toy_call(**sizes)))


def _measured(captured: Captured) -> Costs:
    """As if a device did all at a third of the speed that is estimated, and for two nodes more."""
    costs = estimate(captured)
    ms = {n: 3e3 * t for n, t in costs.ms.items()}
    return replace(costs, ms=ms, source="measured on a card")


def test_costs_grow_as_flops_and_bytes_do() -> None:
    module = toy()
    small, large = _captured(module), _captured(module, size=16, batch=3)
    known = Measured()
    assert known.at_other_sizes("a card", large) is None
    known.keep("a card", small, _measured(small))
    found = known.at_other_sizes("a card", large)
    assert found is not None and found.source == "measured on a card, at other sizes"
    want = _measured(large)
    assert found.macs == want.macs
    for node in large.nodes:
        assert found.ms[node] == pytest.approx(want.ms[node])
    # What takes as good as no time takes no less than that, however small it becomes.
    tiny = replace(_measured(large), ms=dict.fromkeys(large.nodes, 0.0015))
    known.keep("a card", large, tiny)
    again = known.at_other_sizes("a card", small)
    assert again is not None and set(again.ms.values()) == {0.0015}


def test_of_another_card_or_other_operations_nothing_is_known() -> None:
    module = toy()
    small = _captured(module)
    known = Measured()
    known.keep("a card", small, _measured(small))
    assert known.at_other_sizes("another", small) is None
    deep = Toy(depth=5).double().eval().requires_grad_(False)
    assert known.at_other_sizes("a card", _captured(deep)) is None


@pytest.mark.parametrize("afterwards", [True, False])
def test_another_size_is_not_measured_where_components_are_timed(
    afterwards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, times = toy(), []
    measure = profiler.measure

    def counted(*args: Any) -> Costs:
        times.append(1)
        return measure(*args)

    monkeypatch.setattr(profiler, "measure", counted)
    monkeypatch.setattr(profiler.Profiler, "_timed_afterwards", afterwards)
    denoiser = AsyncDenoiser(module, components=2, devices=["cpu"] * 2)
    with contextlib.closing(denoiser):
        for size in (8, 16, 8):
            call = toy_call(size=size)
            with denoiser.generation([0.5]):
                torch.testing.assert_close(denoiser(**call), module(**call))
    assert len(times) == (1 if afterwards else 2)
