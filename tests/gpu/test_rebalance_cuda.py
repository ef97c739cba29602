"""Components are timed on GPUs of their own, and cut once more where they are unequal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import Toy, toy_call

import asyncdiff
from asyncdiff.graph.capture import Captured
from asyncdiff.partition.cost import Costs
from asyncdiff.runtime import making as prepared
from asyncdiff.runtime.cutting import profiler
from asyncdiff.runtime.cutting import rebalance as recut
from asyncdiff.runtime.engine import Engine


def wide() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A denoiser whose layers take a GPU longer than their launches, and a call of it."""
    torch.manual_seed(0)
    module = Toy(width=128, depth=8).float().cuda().eval().requires_grad_(False)
    call = {k: v.float() if v.is_floating_point() else v for k, v in toy_call(size=128).items()}
    return module, {k: v.cuda() for k, v in call.items()}


def unevenness(times: list[float]) -> float:
    return max(times) * len(times) / sum(times)


def test_components_on_one_gpu_are_not_timed() -> None:
    module, call = wide()
    denoiser = asyncdiff.AsyncDenoiser(module, (), call, devices=["cuda:0"] * 2, components=2)
    engine = denoiser._engine
    assert isinstance(engine, Engine) and recut.component_ms(engine) is None
    denoiser.close()


@pytest.mark.alone
def test_wrong_costs_are_corrected_on_several_gpus(
    monkeypatch: pytest.MonkeyPatch, full_float32: None
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    module, call = wide()
    cuts: list[Any] = []
    times: list[list[float]] = []

    def wrong(captured: Captured, *_: Any) -> Costs:
        """As if the way up, which takes most, took no time."""
        ms = {n: 0.0 if n in captured.views else 1.0 for n in captured.nodes}
        ms |= {n: 0.01 for n in ms if captured.module_path(n).startswith("up")}
        return Costs(ms, dict.fromkeys(captured.nodes, 0), "measured wrongly")

    def timed(engine: Engine, *more: Any) -> list[float] | None:
        cuts.append(engine.partition.cuts)
        found = recut.component_ms(engine, *more)
        assert found is not None
        times.append(found)
        return found

    monkeypatch.setattr(profiler, "measure", wrong)
    monkeypatch.setattr(prepared, "component_ms", timed)
    monkeypatch.setattr(recut, "SHORTEST", 0.0)
    want = module(**call)[0]
    random = torch.cuda.get_rng_state_all()
    denoiser = asyncdiff.AsyncDenoiser(
        module, (), call, devices=["cuda:0", "cuda:1"], components=2, warmup=2, compile=False
    )
    assert denoiser.partition.cuts != cuts[0]
    # Preparing does not change what the user draws next.
    assert all(map(torch.equal, random, torch.cuda.get_rng_state_all()))
    engine = denoiser._engine
    assert isinstance(engine, Engine)
    even = recut.component_ms(engine)
    assert even is not None and unevenness(even) < unevenness(times[0])
    with denoiser.generation([900, 900]):
        for _ in range(2):
            assert torch.allclose(denoiser(**call)[0], want, rtol=1e-4, atol=1e-4)
    denoiser.close()
