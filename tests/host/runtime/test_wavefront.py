"""Waves through the engine and the drop-in, against an independent simulation in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import diffusers
import pytest
import reference
import torch
from emulation import Waves
from rotation import often
from tiny_pipelines import draw, tiny_sd, tiny_unet
from toys import Toy, toy, toy_call
from wave_emulation import generate

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError, PlanError, SchedulerError
from asyncdiff.graph.signature import parse
from asyncdiff.partition.ownership import by_modules
from asyncdiff.sampling.predictor import REACH, Line

CALL = tiny_sd()[1]
SPLITS = {
    1: [["enter", "down", "mix", "up", "leave"]],
    2: [["enter", "down"], ["mix", "up", "leave"]],
    3: [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]],
    4: [["enter", "down.0"], ["down.1", "down.2"], ["mix", "up.0"], ["up.1", "up.2", "leave"]],
}
STEPS = 9


def pipeline() -> Any:
    pipe = tiny_sd()[0]
    pipe.scheduler = ddim()
    return pipe


class Residual(Toy):
    """A Toy whose last component reads the latents too."""

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        (out,) = super().forward(sample, timestep, encoder_hidden_states)
        return (out + 0.3 * sample,)


def residual() -> Residual:
    torch.manual_seed(0)
    return Residual().double().eval().requires_grad_(False)


def ddim(steps: int = STEPS, **options: Any) -> Any:
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def run(denoiser: AsyncDenoiser, scheduler: Any) -> torch.Tensor:
    call = toy_call()
    x = call["sample"]
    with denoiser.generation(scheduler.timesteps, scheduler):
        for t in scheduler.timesteps:
            (noise,) = denoiser(x, t, call["encoder_hidden_states"])
            x = scheduler.step(noise, t, x, return_dict=False)[0]
    return x


def oracle(denoiser: AsyncDenoiser, **numbers: Any) -> torch.Tensor:
    """What a denoiser that has run should give: by whole evaluations, but for their components."""
    scheduler, call = ddim(), toy_call()
    kept = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    captured, count = denoiser.partition.captured, denoiser.config.components
    owners = by_modules(captured, SPLITS[count])
    delay = denoiser.plan(STEPS).delay
    waves = Waves(captured, owners, count, delay, parse(denoiser.module, (), call))
    return generate(
        lambda x, k: waves.exact(x, scheduler.timesteps[k]),
        lambda x, noise, k: scheduler.step(noise, scheduler.timesteps[k], x, return_dict=False)[0],
        call["sample"],
        kept.sqrt().tolist(),
        (1 - kept).sqrt().tolist(),
        reach=REACH,
        wave=lambda x, k: waves.wave(x, scheduler.timesteps[k]),
        delay=delay,
        **numbers,
    )


#: (components, delay): all that there are, and the default.
SHAPES = [(1, None), (2, None), (3, None), (3, 2), (4, 1), (4, 2), (4, 3)]
#: Tried every time, with a stride: each shape once, each stride with a delay that is given.
OFTEN = [
    *((1, None, 1), (3, None, 1), (4, 2, 1)),
    *((2, None, 2), (4, 3, 2)),
    *((3, 2, 3), (4, 1, 3)),
]


@pytest.mark.parametrize(
    ("components", "delay", "stride"),
    often(OFTEN, [(*shape, stride) for stride in (1, 2, 3) for shape in SHAPES]),
)
def test_equals_the_simulation(components: int, delay: int | None, stride: int) -> None:
    for module in (toy(), residual()):
        denoiser = AsyncDenoiser(
            module,
            devices=["cpu"] * components,
            components=components,
            stride=stride,
            split=SPLITS[components],
            schedule="wavefront",
            delay=delay,
        )
        for warmup, tail, order in itertools.product((1, 3), (0, 2), (0, 0.5, 1)):
            denoiser.configure(warmup=warmup, exact_tail=tail, order=order)
            got = run(denoiser, ddim())
            want = oracle(denoiser, stride=stride, warmup=warmup, order=order, exact_tail=tail)
            # The levels of the scheduler are in float32.
            torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
        denoiser.close()


def test_all_exact_is_the_plain_pipeline() -> None:
    for numbers in ({"warmup": 4}, {"warmup": 1, "exact_tail": 3}):
        pipe = pipeline()
        handle = asyncdiff.parallelize(
            pipe, devices=["cpu"] * 3, components=3, split="estimate", schedule="wavefront",
            **numbers,
        )  # fmt: skip
        got = draw(pipe, CALL, num_inference_steps=4)
        want = draw(pipeline(), CALL, num_inference_steps=4)
        assert reference.distance(got, want) < 1e-5
        handle.restore()


def test_one_component_is_the_plain_pipeline() -> None:
    pipe = pipeline()
    handle = asyncdiff.parallelize(pipe, devices=["cpu"], components=1, schedule="wavefront")
    got = draw(pipe, CALL)
    assert reference.distance(got, draw(pipeline(), CALL)) < 1e-5
    handle.restore()


@pytest.fixture(scope="module")
def shared() -> Any:
    pipe = pipeline()
    handle = asyncdiff.parallelize(
        pipe, devices=["cpu"] * 2, split="estimate", warmup=4, schedule="wavefront"
    )
    yield pipe
    handle.restore()


SAMPLERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
]


@pytest.mark.parametrize(
    ("guidance", "name"),
    often(
        [(1.0, "UniPCMultistepScheduler"), *((5.0, name) for name in SAMPLERS)],
        itertools.product((1.0, 5.0), SAMPLERS),
    ),
)
def test_any_scheduler(shared: Any, name: str, guidance: float) -> None:
    """A longer run stays near the plain pipeline, with a denoiser of random weights."""
    plain = pipeline()
    config = plain.scheduler.config
    results = []
    for pipe in (plain, shared):
        pipe.scheduler = getattr(diffusers, name).from_config(config)
        options = {"num_inference_steps": 20, "generator": torch.Generator().manual_seed(3)}
        results.append(draw(pipe, CALL, guidance_scale=guidance, **options))
    # Fresh noise in every step is what a late clean image knows least of.
    bound = 0.1 if "Ancestral" in name else 0.02
    assert reference.distance(results[1], results[0]) < bound


def test_v_prediction_and_image_to_image_times(shared: Any, monkeypatch: Any) -> None:
    """Times that begin in the middle of the schedule, as image-to-image pipelines have them."""
    # The engine watches each condition by itself, which the guided x0 here does not show.
    monkeypatch.setattr("asyncdiff.sampling.predictor.SWING", math.inf)
    unet = tiny_unet()
    call = CALL
    text = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    scheduler = diffusers.DDIMScheduler.from_config(
        pipeline().scheduler.config, prediction_type="v_prediction"
    )
    scheduler.set_timesteps(20)
    shared.scheduler = scheduler
    shared.unet.__dict__["_asyncdiff"].denoiser.configure(order=0.75)
    times = scheduler.timesteps[8:]

    def guided(denoiser: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        z = torch.cat([x, x])
        out = denoiser(z, t, encoder_hidden_states=text, return_dict=False)[0]
        first, second = out.chunk(2)
        return first + 3 * (second - first)

    got = call["latents"]
    for t in times:
        v = guided(shared.unet, got, t)
        got = scheduler.step(v, t, got, return_dict=False)[0]
    kept = scheduler.alphas_cumprod.double()[times]
    alphas, sigmas = kept.sqrt().tolist(), (1 - kept).sqrt().tolist()

    def noise(x: torch.Tensor, k: int) -> torch.Tensor:
        return alphas[k] * guided(unet, x.float(), times[k]).double() + sigmas[k] * x

    def step(x: torch.Tensor, e: torch.Tensor, k: int) -> torch.Tensor:
        v = (e - sigmas[k] * x) / alphas[k]
        return scheduler.step(v, times[k], x, return_dict=False)[0]

    want = generate(
        noise, step, call["latents"].double(), alphas, sigmas, delay=1, stride=1, warmup=4,
        order=0.75, reach=REACH, watch=False, carry=lambda a, s, a2, s2: a * a2 + s * s2,
    )  # fmt: skip
    assert reference.distance(got, want) < 1e-4


def test_extrapolation_is_a_line_with_a_bound() -> None:
    assert Line(1).estimate([0], 5).clean == {0: 1.0}
    assert Line(1).estimate([0, 1], 3).clean == {1: 3.0, 0: -2.0}
    assert Line(0.5).estimate([0, 1], 3).clean == {1: 2.0, 0: -1.0}
    assert Line(0).estimate([0, 1], 3).clean == {1: 1.0}
    assert Line(1).estimate([0, 2, 5], 5).clean == {5: 1.0}
    assert Line(1).estimate([0, 2, 5], 3).clean == {2: 1.5, 0: -0.5}
    assert Line(1).estimate([0, 1], 99).clean == {1: 1 + REACH, 0: -REACH}


def test_what_cannot_be_served_says_why() -> None:
    make = {"devices": ["cpu"] * 2, "split": SPLITS[2]}
    with pytest.raises(PlanError, match="write one of asyncdiff, wavefront"):
        AsyncDenoiser(toy(), **make, schedule="waves")
    with pytest.raises(PlanError, match="order=2"):
        AsyncDenoiser(toy(), **make, schedule="wavefront", order=2)
    with pytest.raises(PlanError, match="order belongs"):
        AsyncDenoiser(toy(), **make, order=1)
    with pytest.raises(PlanError, match="delay belongs"):
        AsyncDenoiser(toy(), **make, delay=1)
    with pytest.raises(PlanError, match="after 1 to 1 ticks"):
        AsyncDenoiser(toy(), **make, schedule="wavefront", delay=2)
    with pytest.raises(PlanError, match="extrapolate belongs"):
        AsyncDenoiser(toy(), **make, schedule="wavefront", extrapolate=1.0)
    denoiser = AsyncDenoiser(toy(), **make, schedule="wavefront", warmup=3, exact_tail=2)
    with pytest.raises(SchedulerError, match="pass the scheduler"), denoiser.generation([1, 2, 3]):
        pass
    with (
        pytest.raises(PlanError, match="exact_tail <= 1"),
        denoiser.generation(ddim(4).timesteps, ddim(4)),
    ):
        pass
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(9)
    with (
        pytest.raises(SchedulerError, match="neither sigmas"),
        denoiser.generation(scheduler.timesteps, scheduler),
    ):
        pass
    circle = [["down.1", "down.2", "mix"], ["enter", "down.0", "up", "leave"]]
    backwards = AsyncDenoiser(toy(), devices=["cpu"] * 2, split=circle, schedule="wavefront")
    with pytest.raises(PlanError, match="comes after it"):
        run(backwards, ddim())
    for d in (denoiser, backwards):
        d.close()


def test_a_denoiser_without_a_prediction_for_each_latent() -> None:
    class Wide(Toy):
        def forward(
            self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
        ) -> tuple[torch.Tensor]:
            (out,) = super().forward(sample, timestep, encoder_hidden_states)
            return (torch.cat([out, out], 1),)

    denoiser = AsyncDenoiser(
        Wide().double().eval().requires_grad_(False),
        devices=["cpu"] * 2,
        split=SPLITS[2],
        schedule="wavefront",
    )
    with pytest.raises(InputError, match="one prediction for each latent"):
        run(denoiser, ddim())
    denoiser.close()


@pytest.mark.parametrize(("components", "stride"), [(2, 1), (3, 2)])
def test_extrapolated_crossing_values(components: int, stride: int) -> None:
    """In the published schedule: nothing changes with 0, and with 1 it lies nearer."""
    scheduler, module, call = ddim(30), toy(), toy_call()
    x = call["sample"]
    for t in scheduler.timesteps:
        noise = module(x, t, call["encoder_hidden_states"])[0]
        x = scheduler.step(noise, t, x, return_dict=False)[0]
    distances = []
    for extrapolate in (0.0, 1.0):
        denoiser = AsyncDenoiser(
            toy(),
            devices=["cpu"] * (components + stride - 1),
            components=components,
            stride=stride,
            warmup=2,
            split=SPLITS[components],
            extrapolate=extrapolate,
        )
        got = x
        scheduler, y = ddim(30), call["sample"]
        with denoiser.generation(scheduler.timesteps):
            for t in scheduler.timesteps:
                (noise,) = denoiser(y, t, call["encoder_hidden_states"])
                y = scheduler.step(noise, t, y, return_dict=False)[0]
        distances.append(reference.distance(y, got))
        denoiser.close()
    assert distances[1] < distances[0]


def test_rescaled_guidance_while_no_prediction_has_arrived() -> None:
    call = toy_call(batch=4)
    denoiser = AsyncDenoiser(
        toy(), devices=["cpu"] * 3, components=3, split=SPLITS[3], schedule="wavefront"
    )
    got = denoiser.generate(
        call["sample"][:2],
        {"encoder_hidden_states": call["encoder_hidden_states"]},
        ddim(),
        guidance_scale=4.0,
        guidance_rescale=0.7,
    )
    assert bool(got.isfinite().all())
    report = denoiser.report()
    assert (report.steps, report.ticks) == (STEPS, STEPS)
    denoiser.close()
