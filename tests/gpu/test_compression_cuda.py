"""Compressed bundles on GPUs: the kernels beside their reference, engines in CUDA graphs."""

from __future__ import annotations

import importlib.util
from typing import Any

import diffusers
import pytest
import torch
from codecs_example import DTYPES, SIZES, check_wild, example, same, sent, wild
from conftest import PLACES, devices_for
from toys import Toy, toy_call

from asyncdiff import AsyncDenoiser
from asyncdiff.runtime.exchange.compression import ends, reference
from asyncdiff.runtime.exchange.compression.codec import LARGEST

pytestmark = pytest.mark.usefixtures("full_float32")

SPLIT = [["enter", "down"], ["mix", "up", "leave"]]
KINDS = sorted(LARGEST)
STEPS = 10


def needs_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", SIZES)
def test_kernels_compute_what_the_reference_does(kind: str, dtype: torch.dtype, count: int) -> None:
    needs_triton()
    from asyncdiff.runtime.exchange.compression import kernels

    gpu, cpu = example(dtype, count, "cuda:0"), example(dtype, count)
    kernels.encode(*gpu, kind)
    reference.encode(*cpu, kind)
    assert torch.equal(gpu.packed.cpu(), cpu.packed)
    assert torch.equal(gpu.new.cpu(), cpu.new)
    kernels.decode(gpu.packed, gpu.last, gpu.older, gpu.older, kind)
    assert torch.equal(gpu.older, gpu.new)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_arrives_as_nan(kind: str) -> None:
    needs_triton()
    from asyncdiff.runtime.exchange.compression import kernels

    value, last, older, new, packed = example(torch.float16, SIZES[0], "cuda:0")
    value[100], value[200] = torch.nan, torch.inf
    kernels.encode(value, last, older, new, packed, kind)
    kernels.decode(packed, last, older, older, kind)
    assert new[[100, 200]].isnan().all() and older[[100, 200]].isnan().all()
    assert new[:64].isfinite().all() and new[256:].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_gone_with_the_next_value(kind: str, dtype: torch.dtype) -> None:
    needs_triton()
    from asyncdiff.runtime.exchange.compression import kernels

    gpu = sent(kernels, wild(dtype, SIZES[2], "cuda:0"), kind)
    check_wild(gpu)
    for a, b in zip(gpu, sent(reference, wild(dtype, SIZES[2]), kind), strict=True):
        assert torch.equal(a.packed, b.packed)
        same(a.value, b.value)


def drawn(devices: list[str], graphs: bool = True, **settings: Any) -> torch.Tensor:
    """Two generations, which have to be the same."""
    torch.manual_seed(0)
    module = Toy().eval().requires_grad_(False)
    call = {k: v.float() for k, v in toy_call(size=32).items()}
    where = devices[0]
    text = call["encoder_hidden_states"].to(where)
    denoiser = AsyncDenoiser(
        module.to(where), devices=devices, split=SPLIT, compile=False, **settings
    )
    if not graphs:
        denoiser.prepare(call["sample"].to(where), torch.tensor(900).to(where), text)
        for worker in denoiser._engine.workers:  # type: ignore[union-attr]
            worker.graphs.used = False
    found = []
    for _ in range(2):
        scheduler = diffusers.DDIMScheduler(clip_sample=False)
        scheduler.set_timesteps(STEPS)
        latents = call["sample"].to(where)
        with denoiser.generation(scheduler.timesteps, scheduler):
            for t in scheduler.timesteps:
                (noise,) = denoiser(latents, t.to(where), encoder_hidden_states=text)
                latents = scheduler.step(noise, t, latents, return_dict=False)[0]
        found.append(latents.cpu())
    assert denoiser.report().cuda_graphs is (graphs and where != "cpu")
    denoiser.close()
    assert torch.equal(*found)
    return found[0]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"warmup": 2},
        {"warmup": 2, "schedule": "wavefront", "exact_tail": 1},
        {"warmup": 2, "stride": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("place", PLACES)
def test_an_engine_in_graphs(place: str, kind: str, settings: dict[str, Any]) -> None:
    ranks = 1 + settings.get("stride", 1)
    devices = [f"cuda:{d}" for d in devices_for(place, ranks)]
    got = drawn(devices, compress=kind, **settings)
    assert torch.equal(got, drawn(devices, graphs=False, compress=kind, **settings))
    plain = drawn(devices, **settings)
    assert 0 < difference(got, plain) < 0.02
    assert difference(got, drawn(["cpu"] * ranks, compress=kind, **settings)) < 0.02


@pytest.mark.parametrize("place", PLACES)
def test_exact_steps_are_exact(place: str) -> None:
    devices = [f"cuda:{d}" for d in devices_for(place, 2)]
    assert torch.equal(drawn(devices, warmup=STEPS, compress="fp8"), drawn(devices, warmup=STEPS))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    with_kernels = drawn(["cuda:0"] * 2, warmup=2, compress="fp8")
    monkeypatch.setattr(ends, "TRITON", False)
    assert difference(drawn(["cuda:0"] * 2, warmup=2, compress="fp8"), with_kernels) < 0.01
