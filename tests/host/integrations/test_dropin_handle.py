"""A handle, what it parallelises and how that is undone: copies, notebooks, contexts."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import diffusers
import pytest
import reference
import torch
from tiny_pipelines import draw, tiny_sd, tiny_unet

import asyncdiff
from asyncdiff import DeviceError, InputError, PartitionError, PlanError, SchedulerError

STEPS = 4


def spread(pipe: Any, **settings: Any) -> asyncdiff.Handle:
    options: dict[str, Any] = {"devices": ["cpu"] * 2, "split": "estimate", "warmup": STEPS}
    return asyncdiff.parallelize(pipe, **options | settings)


def test_a_copy_with_a_scheduler_of_its_own() -> None:
    """Its scheduler and its callbacks count, also after restore()."""
    pipe, call = tiny_sd()
    mine = copy.copy(pipe)
    mine.scheduler = diffusers.EulerDiscreteScheduler(**{"timestep_spacing": "trailing"})
    want = [draw(p, call) for p in (pipe, mine)]
    assert not torch.allclose(*want)
    handle = spread(pipe)
    other = copy.copy(pipe)
    other.scheduler = mine.scheduler
    again = copy.copy(other)
    seen: list[Any] = []

    def callback(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        seen.append(pipe)
        return kwargs

    for p, due in ((other, want[1]), (pipe, want[0]), (again, want[1])):
        got = draw(p, call, callback_on_step_end=callback)
        assert torch.allclose(got, due, atol=1e-5)
        assert seen == [p] * STEPS
        seen.clear()
    unet = copy.copy(pipe.unet)
    handle.restore()
    for p, due in ((other, want[1]), (pipe, want[0]), (again, want[1])):
        assert type(p) is diffusers.StableDiffusionPipeline
        assert torch.equal(draw(p, call, callback_on_step_end=callback), due)
        assert seen == [p] * STEPS
        seen.clear()
    assert type(unet) is type(pipe.unet) is diffusers.UNet2DConditionModel


def test_a_notebook_cell_that_runs_twice() -> None:
    pipe, call = tiny_sd()
    want = draw(pipe, call)
    first = spread(pipe)
    draw(pipe, call)
    second = spread(pipe, warmup=1)
    assert not first.active and second.active and "restored" in repr(first)
    draw(pipe, call)
    assert second.report().warmup == 1
    first.restore()  # of no effect any more
    assert second.active
    third = spread(copy.copy(pipe))
    assert torch.allclose(draw(pipe, call), want, atol=1e-5)
    assert not second.active and third.active
    asyncdiff.restore(pipe)
    assert not third.active and type(pipe) is diffusers.StableDiffusionPipeline
    assert torch.equal(draw(pipe, call), want)
    asyncdiff.restore(pipe)
    with pytest.raises(InputError, match=r"neither \.unet nor \.transformer"):
        asyncdiff.restore(object())


def test_settings_that_are_wrong_leave_the_pipeline_as_it_was() -> None:
    pipe, _ = tiny_sd()
    with pytest.raises(PlanError):
        spread(pipe, stride=0)
    assert type(pipe) is diffusers.StableDiffusionPipeline
    with spread(pipe) as handle:
        for wrong in ({"stride": 0}, {"split": [["nowhere"], ["mid_block"]]}):
            with pytest.raises((PlanError, PartitionError)):
                spread(pipe, **wrong)
        assert handle.active


def test_what_is_refused_leaves_a_parallelised_pipeline_so() -> None:
    """It was restored, where the error showed only after that."""
    pipe, call = tiny_sd()
    with spread(pipe) as handle:
        want = draw(pipe, call)
        for wrong in ({"components": 3}, {"speeds": [1.0]}, {"memory": ["1GB"]}, {"devices": []}):
            with pytest.raises((DeviceError, InputError)):
                spread(pipe, **wrong)
        ddim = pipe.scheduler
        pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(ddim.config)
        with pytest.raises(SchedulerError):
            spread(pipe, schedule="wavefront")
        pipe.scheduler = ddim
        hook = pipe.unet.mid_block.register_forward_hook(lambda *_: None)
        with pytest.raises(InputError, match="has a forward hook"):
            spread(pipe)
        hook.remove()
        assert handle.active and torch.equal(draw(pipe, call), want)


def test_another_denoiser_in_the_place_of_a_parallelised_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Parallelised, it made a pipeline that could neither draw nor be restored."""
    pipe, call = tiny_sd()
    old, other = pipe.unet, tiny_unet(seed=5)
    before = draw(pipe, call)
    first = spread(pipe)
    pipe.unet = other
    plain, again = (draw(pipe, call) for _ in range(2))
    assert torch.equal(plain, again)
    assert sum("another denoiser than the one" in m for m in caplog.messages) == 1
    second = spread(pipe)
    assert not first.active and type(old) is type(other).__base__
    assert reference.distance(draw(pipe, call), plain) < 1e-5
    assert second.report().steps == STEPS
    first.restore()
    second.restore()
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert torch.equal(draw(pipe, call), plain)
    pipe.unet = old
    assert torch.equal(draw(pipe, call), before)


def test_a_handle_that_is_of_no_use_any_more_says_so() -> None:
    """It told of a preparation that there was none of, and of settings that nobody took."""
    pipe, _ = tiny_sd()
    first = spread(pipe)
    second = spread(pipe)
    for use in (first.prepare, first.calibrate, lambda: first.configure(warmup=2)):
        with pytest.raises(InputError, match="restored, or parallelised anew"):
            use()
    second.configure(warmup=2)
    second.restore()
    assert second.config.warmup == 2


def test_another_pipeline_with_the_same_denoiser() -> None:
    pipe, _ = tiny_sd()
    handle = spread(pipe)
    other = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    with pytest.raises(InputError, match=r"shares its denoiser.*asyncdiff.restore\(pipe\)"):
        spread(other)
    asyncdiff.restore(other)
    assert not handle.active
    spread(other).restore()


def test_a_context() -> None:
    pipe, _ = tiny_sd()
    with spread(pipe) as handle:
        assert handle.active
    assert type(pipe) is diffusers.StableDiffusionPipeline
    with pytest.raises(KeyError), spread(pipe):
        raise KeyError
    assert type(pipe) is diffusers.StableDiffusionPipeline


def test_what_a_handle_says_of_itself() -> None:
    pipe, call = tiny_sd()
    handle = spread(pipe, warmup=2)
    for word in ("StableDiffusionPipeline", "UNet2DConditionModel", "cpu, cpu", "components=2"):
        assert word in repr(handle)
    assert "warmup=2" in repr(handle) and "not used yet" in repr(handle)
    said = []

    def callback(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        said.append(repr(handle))
        return kwargs

    draw(pipe, call, callback_on_step_end=callback)
    assert "at step 2 of 4" in said[1]
    assert "last generation: 4 steps in 4 ticks" in repr(handle)
    handle.restore()
    assert "restored" in repr(handle)


def test_what_the_package_has() -> None:
    """Without that torch is imported, which takes seconds."""
    code = "import sys, asyncdiff; print(dir(asyncdiff), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"'{name}'" in run.stdout for name in asyncdiff.__all__)
    assert run.stdout.rstrip().endswith("False")
