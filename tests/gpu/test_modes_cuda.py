"""Compiled components and split guidance on GPUs: the results of plain components, in graphs."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from conftest import PLACES, devices_for
from toys import tower, tower_call, toy, toy_call

from asyncdiff import AsyncDenoiser, AutoWarmup
from asyncdiff.graph.batch import BatchSplit
from asyncdiff.graph.compiled import compile as compiling
from asyncdiff.graph.conditions import batched_inputs
from asyncdiff.graph.signature import parse

SPLIT = [["enter", "down"], ["mix", "up", "leave"]]
TIMES = torch.arange(900, 100, -100)


def run(denoiser: AsyncDenoiser, dtype: torch.dtype) -> torch.Tensor:
    call = toy_call()
    latents = call["sample"].to("cuda", dtype)
    text = call["encoder_hidden_states"].to("cuda", dtype)
    with denoiser.generation(TIMES):
        for k, t in enumerate(TIMES.to("cuda")):
            (noise,) = denoiser(latents, t, encoder_hidden_states=text)
            latents = latents - (0.1 + 0.01 * k) * noise
    return latents


def spread(dtype: torch.dtype, devices: list[int], **settings: Any) -> AsyncDenoiser:
    return AsyncDenoiser(toy().to("cuda", dtype), devices=devices, split=SPLIT, **settings)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float16, 2e-2)])
def test_compiled_components_are_those_that_were(
    place: str, dtype: torch.dtype, close: float
) -> None:
    devices = devices_for(place, 2)
    plain = spread(dtype, devices, compile=False)
    want = run(plain, dtype)
    plain.close()
    compiled = spread(dtype, devices, compile=True, warmup=1)
    got = run(compiled, dtype)
    report = compiled.report()
    assert report.compiled and report.cuda_graphs and report.compile_s > 0
    assert report.exposed_ms is not None
    torch.testing.assert_close(got, want, rtol=close, atol=close)
    assert torch.equal(run(compiled, dtype), got)  # replayed from the beginning
    compiled.close()


@pytest.mark.parametrize("place", PLACES)
def test_blocks_are_compiled_once_for_a_device(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, call = devices_for(place, 2), tower_call()
    text, gelu = call["encoder_hidden_states"].to("cuda"), torch.ops.aten.gelu.default
    given: list[int] = []
    inductor = torch._inductor.compile

    def counted(piece: Any, arguments: Any) -> Any:
        given.append(len(piece.graph.find_nodes(op="call_function", target=gelu)))
        return inductor(piece, arguments)

    def drawn(compile: bool | str) -> torch.Tensor:
        halves = [["enter", "blocks.0", "blocks.1", "blocks.2"], ["blocks.3", "blocks.4"]]
        halves[1] += ["blocks.5", "leave"]
        denoiser = AsyncDenoiser(tower().to("cuda"), devices=devices, split=halves, compile=compile)
        latents = call["hidden_states"].to("cuda")
        with denoiser.generation(TIMES):
            for t in TIMES.to("cuda"):
                latents = latents - 0.1 * denoiser(latents, t, encoder_hidden_states=text)
        assert denoiser.report().compiled == bool(compile) and denoiser.report().cuda_graphs
        denoiser.close()
        return latents

    want = drawn(False)
    monkeypatch.setattr(torch._inductor, "compile", counted)
    monkeypatch.setattr(compiling, "_known", compiling._Known())  # nothing of other tests
    torch.testing.assert_close(drawn("regions"), want, rtol=1e-9, atol=1e-9)
    assert sum(given) == len({*devices})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "modes",
    [
        {"guidance": "split"},
        {"exact_mode": "split", "warmup": 4},
        {"guidance": "split", "exact_mode": "split", "warmup": 4},
    ],
    ids=["guidance", "warmup", "both"],
)
def test_split_guidance_equals_one_group(place: str, stride: int, modes: dict[str, Any]) -> None:
    ranks = (stride + 1) * (2 if "guidance" in modes else 1)
    devices = devices_for(place, ranks)
    plain = spread(
        torch.float64, devices[: stride + 1], stride=stride, warmup=modes.get("warmup", 1)
    )
    want = run(plain, torch.float64)
    plain.close()
    split = spread(torch.float64, devices, stride=stride, **modes)
    torch.testing.assert_close(run(split, torch.float64), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run(split, torch.float64), want, rtol=1e-9, atol=1e-9)
    assert split.report().cuda_graphs
    split.close()


@pytest.mark.parametrize("place", PLACES)
def test_exact_steps_by_what_happens(place: str) -> None:
    devices = devices_for(place, 2)
    # Any change after the first is a decline, so that the number found is the least there is.
    auto = spread(torch.float32, devices, warmup=AutoWarmup(most=7, decline=1.0))
    got = run(auto, torch.float32)
    found = auto.report().warmup
    assert 4 <= found <= 7 and auto.report().cuda_graphs
    fixed = spread(torch.float32, devices, warmup=found)
    assert torch.equal(got, run(fixed, torch.float32))
    assert torch.equal(got, run(auto, torch.float32))
    auto.close()
    fixed.close()


class Slow(torch.nn.Module):
    """A denoiser that takes 20 ms or so, whatever its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.only = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.ops.asyncdiff_test.slowly(self.only(sample)) + timestep / 1000,)


@torch.library.custom_op("asyncdiff_test::slowly", mutates_args=())
def slowly(x: torch.Tensor) -> torch.Tensor:
    torch.cuda._sleep(40_000_000)
    return x.clone()


@slowly.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def seconds(**settings: Any) -> float:
    """Of a generation whose CUDA graphs are there."""
    torch.manual_seed(0)
    denoiser = AsyncDenoiser(Slow().to("cuda:0"), components=1, split="estimate", **settings)
    noise = torch.randn(2, 4, 8, 8, device="cuda:0")
    times = TIMES.to("cuda:0")
    try:
        for _ in range(2):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            latents = noise
            with denoiser.generation(times):
                for t in times:
                    latents = latents - 0.1 * denoiser(latents, t)[0]
            torch.cuda.synchronize()
        return time.perf_counter() - begun
    finally:
        denoiser.close()


@pytest.mark.alone
def test_two_gpus_work_at_once() -> None:
    """Ranks of one tick that both deliver do not wait for each other."""
    devices = [f"cuda:{d}" for d in devices_for("several GPUs", 2)]
    one = seconds(devices=devices[:1])
    assert seconds(devices=devices, guidance="split") < 1.3 * one  # not twice as long
    exact = {"warmup": len(TIMES), "exact_mode": "split", "stride": 2}
    assert seconds(devices=devices, **exact) < 1.3 * one
    # One exact step, then two in every tick.
    assert seconds(devices=devices, stride=2) < 0.8 * one
    assert seconds(devices=devices[::-1], stride=2) < 0.8 * one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_conditions_are_told_apart_wherever_the_weights_are(dtype: torch.dtype, home: str) -> None:
    module = toy().to(home, dtype)
    call = {
        name: t.to("cuda", dtype if t.is_floating_point() else t.dtype)
        for name, t in toy_call(batch=4, size=32).items()
    }
    assert batched_inputs(module, parse(module, (), call), BatchSplit(1, 2)) == [True, False, True]
    assert {p.device.type for p in module.parameters()} == {home}
