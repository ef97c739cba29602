"""The drop-in in the surroundings that users bring: image to image, modes of torch, other threads,
patched denoisers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import threading
from typing import Any

import diffusers
import pytest
import reference
import torch
from tiny_pipelines import tiny_flux
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError, quality
from asyncdiff.graph.signature import Role, parse
from asyncdiff.sampling.clean_image import clean_image

SPEC, XL = reference.SMALL, reference.SMALL_XL


@pytest.mark.parametrize(
    ("name", "steps", "strength"), [("DDIMScheduler", 10, 0.5), ("PNDMScheduler", 10, 0.8)]
)
def test_any_strength(name: str, steps: int, strength: float) -> None:
    base = reference.pipeline(SPEC)
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **base.components, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.scheduler = getattr(diffusers, name)(**options)
    call = {k: v for k, v in reference.inputs(SPEC).items() if k.endswith("embeds")}
    image = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))  # latents
    call |= {"image": image, "strength": strength, "guidance_scale": 4.0, "output_type": "latent"}
    pipe.vae_scale_factor = 8

    def run() -> torch.Tensor:
        g = torch.Generator().manual_seed(2)
        return pipe(**call, num_inference_steps=steps, generator=g).images

    want = run()
    count = pipe.num_timesteps  # all of them exact
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=count, split=SPEC["split"])
    assert reference.distance(run(), want) < 1e-3  # of rounding, which some schedules amplify
    assert handle.report().steps == pipe.num_timesteps < len(pipe.scheduler.timesteps)
    handle.restore()


def test_levels_that_are_not_those_of_the_timesteps_are_exact() -> None:
    """PNDM's in image to image."""
    results = []
    for parallel in (False, True):
        base = reference.pipeline(SPEC)
        pipe = diffusers.StableDiffusionImg2ImgPipeline(
            **base.components, requires_safety_checker=False
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
        pipe.vae_scale_factor = 8
        call = {k: v for k, v in reference.inputs(SPEC).items() if k.endswith("embeds")}
        image = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        if parallel:
            handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, split="estimate")
        results.append(
            pipe(**call, image=image, strength=0.6, num_inference_steps=30, output_type="latent",
                 generator=torch.Generator().manual_seed(2)).images
        )  # fmt: skip
    assert "PNDMScheduler has other noise levels than its timesteps say" in handle.settings
    assert reference.distance(results[1], results[0]) < 1e-3
    handle.restore()


def test_settings_are_for_the_steps_that_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the end of the schedule, where another pipeline takes that."""
    pipe = reference.pipeline(XL)
    handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, split="estimate")
    lengths = []

    def pick(_: str, task: quality.Task, *given: Any) -> quality.Picked:
        lengths.append(task.step)
        return quality.pick("exact", task, *given)

    monkeypatch.setattr("asyncdiff.integrations.auto.pick", pick)
    reference.run(pipe, XL, num_inference_steps=10, denoising_end=0.7)
    levels = clean_image(pipe.scheduler).of_steps(0, 7).log_snr
    assert lengths == [statistics.median(b - a for a, b in itertools.pairwise(levels))]
    handle.restore()


def test_a_pipeline_that_leaves_the_end_to_another() -> None:
    pipe = reference.pipeline(XL)
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, split=XL["split"], exact_tail=2)
    reference.run(pipe, XL, num_inference_steps=10, denoising_end=0.7)
    report = handle.report()
    assert report.steps == pipe.num_timesteps == 7
    # Two exact steps are at the end of these; with all of them exact it is the plain pipeline.
    assert [tick.exact for tick in handle.plan(7).ticks] == [True] + [False] * 4 + [True] * 2
    handle.denoiser.configure(warmup=7, exact_tail=0)
    got = reference.run(pipe, XL, num_inference_steps=10, denoising_end=0.7)
    plain = reference.pipeline(XL)
    want = reference.run(plain, XL, num_inference_steps=10, denoising_end=0.7)
    assert reference.distance(got, want) < 1e-5
    handle.restore()


def test_the_denoiser_called_by_others_than_its_pipeline() -> None:
    """They have as many steps as the schedule, whatever the pipeline last had."""
    pipe, call = tiny_flux()
    pipe.set_progress_bar_config(disable=True)
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=2, split="estimate")
    pipe(**call, num_inference_steps=3, output_type="latent")
    other = diffusers.FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    other(**call, num_inference_steps=8, output_type="latent")
    assert handle.report().steps == 8
    handle.restore()


@pytest.mark.parametrize("first", [True, False])
def test_modes_of_torch(first: bool) -> None:
    """Inference mode for the first call or a later one; autocast, which changes dtypes inside."""
    pipe = reference.pipeline(SPEC)
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=2, split=SPEC["split"])
    want = reference.run(reference.pipeline(SPEC), SPEC, num_inference_steps=4)
    modes: list[Any] = [torch.inference_mode(), contextlib.nullcontext()]
    modes = [*(modes if first else modes[::-1]), torch.autocast("cpu", torch.bfloat16)]
    got = []
    for mode in modes:
        with mode:
            got.append(reference.run(pipe, SPEC, num_inference_steps=4))
    assert all(torch.equal(g, got[0]) for g in got) and reference.distance(got[0], want) < 1.0
    handle.restore()


def test_conditioning_with_a_gradient_keeps_no_graph() -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split="estimate")
    call = toy_call()
    text = call["encoder_hidden_states"].requires_grad_() * 1.0
    for _ in range(2):
        with torch.no_grad(), denoiser.generation([9, 8, 7]):
            for t in (9, 8, 7):
                (out,) = denoiser(call["sample"], torch.tensor(t), text)
    assert not out.requires_grad
    assert denoiser._engine is not None
    held = [t for w in denoiser._engine.workers for t in w.program.static.values()]
    assert held and not any(t.requires_grad for t in held)
    denoiser.close()


def test_results_stay_what_they_were() -> None:
    """A caller may keep all outputs of a step, also those of an earlier component."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, sample: Any, timestep: Any) -> Any:
            h = self.a(sample + timestep)
            return self.b(torch.relu(h)), h, timestep * 2.0

    module = Two().eval().requires_grad_(False)
    denoiser = AsyncDenoiser(module, devices=["cpu"] * 2, split=[["a"], ["b"]], warmup=6)
    times, latents = torch.arange(6.0, 0, -1), torch.randn(6, 2, 4)
    with denoiser.generation(times):
        kept = [denoiser(x, t) for x, t in zip(latents, times, strict=True)]
    for got, x, t in zip(kept, latents, times, strict=True):
        assert all(torch.allclose(g, w) for g, w in zip(got, module(x, t), strict=True))
    denoiser.close()


def test_another_thread_takes_its_turn() -> None:
    """A generation of the denoiser's own does not come between two steps of a pipeline."""
    pipe = reference.pipeline(SPEC)
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, split=SPEC["split"])
    want = reference.run(pipe, SPEC)
    call = toy_call()
    began, order = threading.Event(), []

    def other() -> None:
        began.wait(60)
        with handle.denoiser.generation(call["timestep"][None]):
            order.append("other")

    def step(pipe: Any, k: int, t: Any, kwargs: Any) -> Any:
        if k == 2:
            began.set()
            thread.join(0.3)
            order.append("pipeline")
        return kwargs

    thread = threading.Thread(target=other)
    thread.start()
    got = reference.run(pipe, SPEC, callback_on_step_end=step)
    thread.join(60)
    assert order == ["pipeline", "other"] and torch.equal(got, want)
    assert handle.report().steps == SPEC["steps"]
    handle.restore()


def test_a_replaced_forward_is_refused() -> None:
    pipe = reference.pipeline(SPEC)
    pipe.unet.forward = lambda *args, **kwargs: None
    with pytest.raises(InputError, match="forward was replaced"):
        asyncdiff.parallelize(pipe, devices=["cpu"] * 2)


def test_latents_in_a_list() -> None:
    """As Z-Image takes them, a picture each; not so tuples of unlike tensors."""

    class Listed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toy()

        def forward(self, x: Any, t: Any, text: Any) -> Any:
            return tuple(self.inner(a[None], t, text)[0][0] for a in x)

    module = Listed().eval()
    call = toy_call()
    pictures, text = list(call["sample"]), call["encoder_hidden_states"][:1]
    roles = {
        x.name: x.role
        for x in parse(module, (pictures, torch.tensor(9), text), {}).signature.inputs
    }
    assert roles["x.0"] is roles["x.1"] is Role.LATENTS and roles["text"] is Role.CONDITIONING
    unlike = parse(module, ([pictures[0], text], torch.tensor(9), text), {})
    assert len(unlike.indices(Role.LATENTS)) == 1
    times = torch.tensor([9, 8, 7])
    denoiser = AsyncDenoiser(module, devices=["cpu"] * 2, split="estimate", warmup=3)
    with denoiser.generation(times):
        for t in times:
            got = denoiser(pictures, t, text)
            want = module(pictures, t, text)
            assert all(torch.allclose(a, b) for a, b in zip(got, want, strict=True))
            pictures = [p - 0.1 * g for p, g in zip(pictures, got, strict=True)]
    denoiser.close()
    for options in ({"schedule": "wavefront"}, {"exact_mode": "split"}):
        refusing = AsyncDenoiser(module, devices=["cpu"] * 2, split="estimate", **options)
        with pytest.raises(InputError, match="takes its latents as a list"):
            refusing.prepare(pictures, times[0], text)
        refusing.close()


def test_preparing_other_inputs_in_the_middle_is_refused() -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split="estimate")
    call = toy_call()
    with denoiser.generation([9, 8]):
        denoiser(**call)
        denoiser.prepare(**call)
        with pytest.raises(InputError, match="prepare before it or after it"):
            denoiser.prepare(**toy_call(size=4))
        denoiser(**call)
    denoiser.prepare(**toy_call(size=4))
    denoiser.close()


def test_settings_change_through_one_method() -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split="estimate")
    before = denoiser.config
    with pytest.raises(InputError, match="write 'chain' or 'split'"):
        denoiser.configure(exact_mode="splt")
    denoiser.configure(exact_mode="split")
    with pytest.raises(asyncdiff.PlanError, match="needs exact_mode='chain'"):
        denoiser.configure(warmup="auto")
    with pytest.raises(InputError, match=r"stride cannot change any more.*warmup"):
        denoiser.configure(stride=2)
    with pytest.raises(InputError, match=r"no setting warmups: did you mean warmup\?"):
        denoiser.configure(warmups=2)
    with pytest.raises(InputError, match=r"no setting warmups: did you mean warmup\?"):
        AsyncDenoiser(toy(), devices=["cpu"] * 2, warmups=2)
    # Attributes that would change nothing cannot be set.
    for name in ("stride", "extrapolate", "guidance", "order", "exact_tail"):
        with pytest.raises(AttributeError, match=f"read config.{name}"):
            setattr(denoiser, name, 1)
    assert denoiser.config == dataclasses.replace(before, exact_mode="split")
    with pytest.raises(dataclasses.FrozenInstanceError):
        denoiser.config.warmup = 3  # type: ignore[misc]
    denoiser.close()
