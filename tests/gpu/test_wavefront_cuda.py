"""Waves on GPUs: the CPU's numbers, whose emulation host/runtime/test_wavefront.py checks."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import reference
import torch
from conftest import PLACES, devices_for
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser

pytestmark = pytest.mark.usefixtures("full_float32")

SPEC = reference.case("sd21_ddim_n2s1w1")
SPLITS = {
    1: [["enter", "down", "mix", "up", "leave"]],
    2: [["enter", "down"], ["mix", "up", "leave"]],
    3: [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]],
}
STEPS = 9


def denoiser(devices: list[str], components: int, **options: Any) -> AsyncDenoiser:
    return AsyncDenoiser(
        toy().to(devices[0], torch.float32),
        devices=devices,
        components=components,
        split=SPLITS[components],
        **options,
    )


def generate(model: AsyncDenoiser, home: str, **options: Any) -> torch.Tensor:
    call = toy_call(batch=16)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return model.generate(
        call["sample"][:8].to(home, torch.float32),
        {"encoder_hidden_states": call["encoder_hidden_states"].to(home, torch.float32)},
        scheduler,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        **options,
    ).cpu()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("components", "delay"), [(1, None), (2, None), (3, 1), (3, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_generations_equal_the_cpu(
    place: str, components: int, delay: int | None, stride: int
) -> None:
    """Each twice."""
    options: dict[str, Any] = {"stride": stride, "warmup": 2, "exact_tail": 1}
    options |= {"schedule": "wavefront", "delay": delay}
    names = [f"cuda:{d}" for d in devices_for(place, components)]
    cpu = denoiser(["cpu"] * components, components, order=0.5, **options)
    gpu = denoiser(names, components, order=0.5, **options)
    for how in ({}, {"guidance_rescale": 0.7}):
        want = generate(cpu, "cpu", **how)
        first = generate(gpu, names[0], **how)
        assert reference.distance(first, want) < 1e-4
        assert torch.equal(generate(gpu, names[0], **how), first)
    cpu.close()
    gpu.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stride", [1, 2])
def test_calibrated_waves_equal_the_cpu(place: str, stride: int) -> None:
    """Calibrated on the GPU; the same coefficients then give the CPU's numbers."""
    options = {"stride": stride, "warmup": 2, "schedule": "wavefront"}
    names = [f"cuda:{d}" for d in devices_for(place, 3)]
    gpu = denoiser(names, 3, **options)
    call = toy_call(batch=16)
    calibration = gpu.calibrate(
        call["sample"][:8].to(names[0], torch.float32),
        {"encoder_hidden_states": call["encoder_hidden_states"].to(names[0], torch.float32)},
        diffusers.DPMSolverMultistepScheduler(),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
    )
    assert calibration.taken
    cpu = denoiser(["cpu"] * 3, 3, order=calibration, **options)
    want = generate(cpu, "cpu")
    assert reference.distance(generate(gpu, names[0]), want) < 1e-4
    cpu.close()
    gpu.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", [{"schedule": "wavefront"}, {"extrapolate": 1.0}])
def test_pipelines_equal_the_cpu(place: str, options: dict[str, Any]) -> None:
    names = [f"cuda:{d}" for d in devices_for(place, 2)]
    results = []
    for devices in (["cpu"] * 2, names):
        pipe = reference.pipeline(SPEC, devices[0])
        handle = asyncdiff.parallelize(
            pipe, devices=devices, split=SPEC["split"], warmup=2, exact_tail=1, **options
        )
        results.append(reference.run(pipe, SPEC, num_inference_steps=STEPS))
        handle.restore()
    assert reference.distance(results[1], results[0]) < 1e-4
