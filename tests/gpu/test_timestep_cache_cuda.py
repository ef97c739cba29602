"""Rows of timesteps on GPUs: the bits of runs that compute their row each time."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from conftest import PLACES, devices_for
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser
from asyncdiff.integrations.diffusers.timesteps import TimestepTracker
from asyncdiff.runtime import rows as timetable
from asyncdiff.runtime.rows import Rows

pytestmark = pytest.mark.usefixtures("full_float32")

SPLIT = [["enter", "down"], ["mix", "up", "leave"]]
TIMES = torch.arange(900, 100, -100)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rank of every row that is computed for a run, or ahead of one."""
    ranks: list[int] = []
    compute = Rows._compute

    def counted(rows: Rows) -> None:
        ranks.append(rows._graphs.rank)
        compute(rows)

    monkeypatch.setattr(Rows, "_compute", counted)
    return ranks


def spread(place: str, stride: int = 1, **settings: Any) -> AsyncDenoiser:
    module = toy().to("cuda:0", torch.float16)
    devices = devices_for(place, 1 + stride)
    return AsyncDenoiser(module, devices=devices, split=SPLIT, stride=stride, **settings)


def run(denoiser: AsyncDenoiser, times: torch.Tensor, copies: bool = False) -> torch.Tensor:
    """``copies``: calls come with tensors that nobody can tell to be the announced timesteps."""
    call = toy_call()
    latents = call["sample"].to("cuda:0", torch.float16)
    text = call["encoder_hidden_states"].to("cuda:0", torch.float16)
    with denoiser.generation(times):
        for t in times:
            (noise,) = denoiser(latents, t.clone() if copies else t, encoder_hidden_states=text)
            latents = latents - 0.1 * noise
    return latents


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "time_shift": True}, {"compile": True}])
def test_the_same_bits(
    place: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    denoiser = spread(place, **settings)
    times = TIMES.to("cuda:0")
    want = run(denoiser, times)
    assert denoiser.report().cuda_graphs and computed
    computed.clear()
    assert torch.equal(run(denoiser, times), want)
    assert torch.equal(run(denoiser, TIMES.to("cuda:0")), want)
    assert not computed  # the timesteps and the conditioning have the values that they had
    assert torch.equal(run(denoiser, times, copies=True), want)
    assert computed
    monkeypatch.setattr(timetable, "TABLE_BYTES", 0)
    assert torch.equal(run(denoiser, times), want)
    denoiser.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_same_bits_on_the_ranks(
    place: str, stride: int, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    import diffusers

    call = toy_call()
    results = []
    for most in (timetable.TABLE_BYTES, 0):
        monkeypatch.setattr(timetable, "TABLE_BYTES", most)
        denoiser = spread(place, stride)
        for _ in range(2):
            computed.clear()
            results.append(
                denoiser.generate(
                    call["sample"][:1].to("cuda:0", torch.float16),
                    {
                        "encoder_hidden_states": call["encoder_hidden_states"].to(
                            "cuda:0", torch.float16
                        )
                    },
                    diffusers.DDIMScheduler(clip_sample=False),
                    num_inference_steps=9,
                    guidance_scale=4.0,
                )
            )
            assert denoiser.report().cuda_graphs
        # Without a table every run computes its row: of the exact step and of each tick; a copy
        # of the last component runs in ticks only.
        runs = 9 + 9 if stride == 1 else (1 + 4) * 2 + 4
        assert len(computed) == (0 if most else runs)
        denoiser.close()
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["sd21_ddim_n2s2w1", "sdxl_euler_n3s2w1"])
def test_a_pipeline_finds_its_rows_again(
    place: str, dtype: torch.dtype, name: str, computed: list[int]
) -> None:
    spec = reference.case(name)
    pipe = reference.pipeline(spec, "cuda:0", dtype)
    ranks = spec["components"] + spec["stride"] - 1
    handle = asyncdiff.parallelize(
        pipe, devices=devices_for(place, ranks), **reference.settings(spec)
    )
    want = reference.run(pipe, spec)
    computed.clear()
    assert torch.equal(reference.run(pipe, spec), want)
    assert not computed
    handle.restore()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flux_finds_its_rows_again(
    place: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, computed: list[int]
) -> None:
    """Its pipeline makes a new tensor of each timestep, with the bits that are computed ahead."""
    from tiny_pipelines import tiny_flux

    pipe, call = tiny_flux()
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda:0", dtype)
    call = {k: v.to("cuda:0", dtype) if torch.is_tensor(v) else v for k, v in call.items()}

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        return pipe(**call, num_inference_steps=9, generator=generator, output_type="latent").images

    handle = asyncdiff.parallelize(
        pipe, devices=devices_for(place, 2), components=2, split="estimate"
    )
    want = run()
    assert handle.report().cuda_graphs and want.isfinite().all()
    computed.clear()
    assert torch.equal(run(), want) and not computed
    monkeypatch.setattr(TimestepTracker, "known", lambda times, step, value: value)
    assert torch.equal(run(), want) and computed
    handle.restore()
