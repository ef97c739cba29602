"""Calibrated waves: the fit, what it gains, and the engine against an independent simulation."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import reference
import torch
from emulation import Waves
from toys import Toy, toy, toy_call
from wave_emulation import generate

import asyncdiff
from asyncdiff import AsyncDenoiser, Calibration, InputError, PlanError, SchedulerError
from asyncdiff.graph.capture import capture
from asyncdiff.graph.signature import parse
from asyncdiff.partition.ownership import by_modules
from asyncdiff.sampling.calibration import TERMS, Shape
from asyncdiff.sampling.clean_image import clean_image
from asyncdiff.sampling.fit import fit, wins
from asyncdiff.sampling.linear import linearize
from asyncdiff.sampling.predictor import Line, Predictor

SPEC = reference.SMALL
SPLITS = {
    2: [["enter", "down"], ["mix", "up", "leave"]],
    3: [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]],
}
STEPS = 9
#: The default of the denoisers without an engine.
LINE = Line(0.5)


def sampler_of(name: str, steps: int) -> Any:
    options = {"clip_sample": False} if name == "DDIMScheduler" else {}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    return scheduler


def waves(module: Toy, components: int, stride: int, **options: Any) -> AsyncDenoiser:
    return AsyncDenoiser(
        module, devices=["cpu"] * components, components=components, stride=stride,
        split=SPLITS[components], schedule="wavefront", **options,
    )  # fmt: skip


def random_calibration(components: int, stride: int, warmup: int) -> Calibration:
    """Any coefficients: what is tested is that they are used as they should be."""
    clean = clean_image(sampler_of("DDIMScheduler", STEPS))
    delay = 1
    late = delay * stride
    newest = []
    for k in range(STEPS):
        tick = k - (k - warmup) % stride
        starts = [j for j in range(k + 1) if j < warmup or (j - warmup) % stride == 0]
        newest.append(
            max([j for j in starts if j <= tick - late or j < warmup]) if k >= warmup else k
        )
    values = torch.rand(STEPS, len(TERMS), generator=torch.manual_seed(4)).double() * 0.2
    return Calibration(
        Shape(components, stride, delay, warmup, 0), clean.alpha, clean.sigma, tuple(newest),
        tuple(tuple(row) for row in values.tolist()),
    )  # fmt: skip


@pytest.mark.parametrize(("components", "stride"), [(2, 1), (3, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("warmup", [1, 3])
def test_the_engine_predicts_as_a_plain_simulation(
    components: int, stride: int, warmup: int
) -> None:
    calibration = random_calibration(components, stride, warmup)
    module, call = toy(), toy_call()
    parsed = parse(module, (), call)
    captured = capture(module, parsed)
    owners = by_modules(captured, SPLITS[components])
    scheduler = sampler_of("DDIMScheduler", STEPS)
    kept = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    alphas, sigmas = kept.sqrt().tolist(), (1 - kept).sqrt().tolist()

    def predict(
        known: dict[int, torch.Tensor], noises: dict[int, torch.Tensor], k: int, x: torch.Tensor
    ) -> torch.Tensor:
        steps = sorted((j for j in known if j <= k), reverse=True)
        a = steps[0]
        if a == k or a != calibration.newest[k]:  # known already
            return known[a]
        slope, curve, off, change = calibration.coefficients[k]
        x0 = known[a] + off * ((x - alphas[k] * known[a]) / sigmas[k] - noises[a])
        if len(steps) > 1:
            x0 = x0 + slope * (known[a] - known[steps[1]]) + change * (noises[a] - noises[steps[1]])
        if len(steps) > 2:
            x0 = x0 + curve * (known[a] - 2 * known[steps[1]] + known[steps[2]])
        return x0

    def simulated() -> torch.Tensor:
        evaluations = Waves(captured, owners, components, 1, parsed)
        return generate(
            lambda x, k: evaluations.exact(x, scheduler.timesteps[k]),
            lambda x, e, k: scheduler.step(e, scheduler.timesteps[k], x, return_dict=False)[0],
            call["sample"], alphas, sigmas, delay=1, stride=stride, warmup=warmup,
            order=0, reach=0, predict=predict,
            wave=lambda x, k: evaluations.wave(x, scheduler.timesteps[k]),
        )  # fmt: skip

    denoiser = waves(module, components, stride, warmup=warmup, order=calibration, delay=1)
    x = call["sample"]
    with denoiser.generation(scheduler.timesteps, scheduler):
        for t in scheduler.timesteps:
            (noise,) = denoiser(x, t, call["encoder_hidden_states"])
            x = scheduler.step(noise, t, x, return_dict=False)[0]
    torch.testing.assert_close(x, simulated(), rtol=1e-9, atol=1e-9)
    conditioning = {"encoder_hidden_states": call["encoder_hidden_states"]}
    got = denoiser.generate(call["sample"], conditioning, scheduler)
    torch.testing.assert_close(got, simulated(), rtol=1e-9, atol=1e-9)
    denoiser.close()


class Gaussian:
    """The exact denoiser of pictures whose pixels are independent Gaussians."""

    def __init__(self, clean: Any) -> None:
        self.clean = clean
        generator = torch.manual_seed(0)
        self.mean = torch.randn(4, 6, 6, generator=generator)
        self.variance = torch.rand(4, 6, 6, generator=generator) ** 4

    def __call__(self, k: int, z: torch.Tensor) -> torch.Tensor:
        a, s = self.clean.alpha[k], self.clean.sigma[k]
        share = a * self.variance / (a * a * self.variance + s * s)
        return self.clean.prediction(k, z, self.mean + share * (z - a * self.mean))


class LateRun:
    """A generation of exact predictions that arrive late: a ``asyncdiff.sampling.fit.Run``.
    ``rule`` predicts where the mode is "default"."""

    def __init__(
        self, denoise: Any, clean: Any, shape: Shape, mode: str = "default", rule: Any = LINE
    ) -> None:
        steps = len(clean.alpha)
        self.denoise, self.shape = denoise, shape
        self.exact = range(steps) if mode == "exact" else range(shape.warmup)
        self.end = steps - shape.exact_tail
        self.under_way: dict[int, dict[int, torch.Tensor]] = {}
        self.predictor = (
            Predictor(clean, rule, shape.delay, shape.stride) if mode == "default" else None
        )
        self.inputs: dict[int, torch.Tensor] = {}

    def step(self, k: int, z: torch.Tensor) -> dict[int, torch.Tensor]:
        self.inputs[k] = z
        arrived = self.arrived(k, z)
        if self.predictor is None:
            return arrived
        for step, prediction in sorted(arrived.items()):
            self.predictor.arrived(step, self.inputs[step], prediction)
        return {k: self.predictor.predict(k, z, z.dtype)}

    def arrived(self, k: int, z: torch.Tensor) -> dict[int, torch.Tensor]:
        if k in self.exact or k >= self.end:
            return {k: self.denoise(k, z)}
        if (k - self.shape.warmup) % self.shape.stride == 0:
            arrival = k + self.shape.delay * self.shape.stride
            self.under_way[arrival] = {k: self.denoise(k, z)}
        return self.under_way.pop(k, {})


def drawn(run: LateRun, first: torch.Tensor, sampler: Any) -> torch.Tensor:
    """The last latents of a generation that says what the sampler is given."""
    given = [first]
    for k in range(len(sampler.scales)):
        given.append(run.step(k, sampler.latents(given) * float(sampler.scales[k]))[k])
    return sampler.latents(given)


def closeness(denoise: Any, shape: Shape, found: Calibration, scheduler: Any, seed: int) -> Any:
    """By how many dB 64 pictures of other noise are closer to the plain ones, calibrated, than by
    the default."""
    clean, sampler = clean_image(scheduler), linearize(scheduler)
    first = torch.randn(64, 4, 6, 6, generator=torch.manual_seed(seed))
    want = drawn(LateRun(denoise, clean, shape, "exact"), first, sampler)
    errors = [
        (drawn(LateRun(denoise, clean, shape, rule=rule), first, sampler) - want)
        .double().square().flatten(1).mean(1)
        for rule in (LINE, found if found.taken else LINE)
    ]  # fmt: skip
    return 10 * (errors[0] / errors[1]).log10()


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize(
    "shape", [Shape(3, 1, 2, 1, 0), Shape(2, 2, 1, 1, 0), Shape(3, 1, 2, 2, 2)]
)
def test_it_beats_the_default_on_pictures_that_it_has_not_seen(name: str, shape: Shape) -> None:
    scheduler = sampler_of(name, 12)
    clean, sampler = clean_image(scheduler), linearize(scheduler)
    first = torch.randn(8, 4, 6, 6, generator=torch.manual_seed(1))
    told: list[tuple[int, int]] = []
    denoise = Gaussian(clean)
    found = fit(
        lambda mode: LateRun(denoise, clean, shape, mode),
        first, sampler, clean, shape, lambda *p: told.append(p),
    )  # fmt: skip
    assert found.taken and len(found.gains) == 4 and min(found.gains) > 3
    assert closeness(denoise, shape, found, scheduler, 2).mean() > 3
    assert told == [(n, 36) for n in range(1, 37)]
    # Exact steps have none, nor has a term that cannot be told yet.
    asynchronous = range(shape.warmup, 12 - shape.exact_tail)
    for k, row in enumerate(found.coefficients):
        assert any(row) == (k in asynchronous)
        assert all(map(math.isfinite, row)) and max(map(abs, row)) < 1e3
    assert found.coefficients[shape.warmup][TERMS.index("curve")] == 0


class TwoKinds:
    """A denoiser that punishes calibrations: of most pictures the clean image moves evenly; a few,
    told by two pixels, are loud, and go to and fro."""

    def __init__(self, clean: Any) -> None:
        self.clean = clean
        self.pattern = torch.randn(4, 6, 6, generator=torch.manual_seed(0))

    def __call__(self, k: int, z: torch.Tensor) -> torch.Tensor:
        flags = z[:, 0, 0, :2].sign()
        loud = (flags > 0).all(1)
        amount = torch.where(loud, 10.0 * (-1) ** k, 0.3 * k)
        x0 = amount.view(-1, 1, 1, 1) * self.pattern
        x0[:, 0, 0, :2] = 3 * flags
        return self.clean.prediction(k, z, x0)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize(("seed", "taken"), [(1, True), (2, False), (5, False), (6, False)])
def test_no_picture_that_it_has_not_seen_is_worse_than_by_the_default(
    name: str, seed: int, taken: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Calibrations judged by all pictures together, and fitted again to all of them after that,
    were 10 dB worse on most others: the loud ones, which came closer, decided both."""
    scheduler = sampler_of(name, 12)
    clean = clean_image(scheduler)
    shape, denoise = Shape(2, 1, 1, 1, 0), TwoKinds(clean)
    first = torch.randn(16, 4, 6, 6, generator=torch.manual_seed(100 + seed))
    found = fit(
        lambda mode: LateRun(denoise, clean, shape, mode),
        first, linearize(scheduler), clean, shape,
    )  # fmt: skip
    assert closeness(denoise, shape, found, scheduler, seed).min() >= -0.2
    assert found.taken == taken == ("left out" not in str(found))
    assert taken == ("the calibration is left out" not in caplog.text)
    if not taken:  # what it would have done
        assert min(found.gains) < -6 and max(found.gains) > 30 and found.coefficients == ()


def test_what_wins_is_certain() -> None:
    assert wins([5.0, 6.0, 5.5, 7.0])
    assert not wins([1.5, 9.0, 1.2, 0.3])  # in the mean only
    assert not wins([9.0, 9.0, 9.0, -0.1])  # one is worse
    assert not wins([0.4, 0.5, 0.4, 0.5])  # for so little


def test_what_does_not_end_is_left_out() -> None:
    scheduler = sampler_of("DDIMScheduler", 6)
    clean = clean_image(scheduler)
    shape = Shape(2, 1, 1, 1, 0)

    def denoise(k: int, z: torch.Tensor) -> torch.Tensor:
        return z * (float("nan") if k == 4 else 1.0)

    found = fit(
        lambda mode: LateRun(denoise, clean, shape, mode),
        torch.randn(8, 4, 6, 6), linearize(scheduler), clean, shape,
    )  # fmt: skip
    assert not found.taken and all(g < 0 for g in found.gains)


def test_where_nothing_is_gained_the_default_stays(tmp_path: Path) -> None:
    """Of a denoiser whose clean image never changes, holding is exact."""
    scheduler = sampler_of("DDIMScheduler", 6)
    clean = clean_image(scheduler)
    image = torch.randn(1, 4, 6, 6, generator=torch.manual_seed(1))
    shape = Shape(2, 1, 1, 1, 0)

    def denoise(k: int, z: torch.Tensor) -> torch.Tensor:
        return clean.prediction(k, z, image.expand_as(z))

    found = fit(
        lambda mode: LateRun(denoise, clean, shape, mode),
        torch.randn(8, 4, 6, 6), linearize(scheduler), clean, shape,
    )  # fmt: skip
    assert not found.taken and max(map(abs, found.gains)) < 0.5
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found
    # Where it is passed, waves are those of the default; of any shape.
    module, call = toy(), toy_call()
    conditioning = {"encoder_hidden_states": call["encoder_hidden_states"]}
    scheduler = sampler_of("DDIMScheduler", STEPS)
    results = []
    for order in (None, found):
        denoiser = waves(module, 3, 1, order=order)
        results.append(denoiser.generate(call["sample"], conditioning, scheduler))
        assert denoiser.report().settings["order"] is None
        denoiser.close()
    assert torch.equal(*results)


def test_a_denoiser_is_calibrated_and_uses_it() -> None:
    module, call = toy(), toy_call(batch=8)
    conditioning = {"encoder_hidden_states": call["encoder_hidden_states"]}
    plain = waves(module, 2, 1, warmup=STEPS)
    scheduler = sampler_of("DPMSolverMultistepScheduler", STEPS)
    want = plain.generate(call["sample"], conditioning, scheduler)
    plain.close()
    denoiser = waves(module, 2, 1, order=0.0)
    before = denoiser.generate(call["sample"], conditioning, scheduler)
    calibration = denoiser.calibrate(call["sample"], conditioning, scheduler)
    assert denoiser.config.order is calibration and denoiser.config.warmup == 1
    assert calibration.taken and len(calibration.gains) == 4
    after = denoiser.generate(call["sample"], conditioning, scheduler)
    assert reference.distance(after, want) < reference.distance(before, want)
    # The drop-in predicts the same.
    x = call["sample"]
    with denoiser.generation(scheduler.timesteps, scheduler):
        for t in scheduler.timesteps:
            (noise,) = denoiser(x, t, call["encoder_hidden_states"])
            x = scheduler.step(noise, t, x, return_dict=False)[0]
    scheduler.set_timesteps(STEPS)
    assert reference.distance(x, denoiser.generate(call["sample"], conditioning, scheduler)) < 1e-9
    denoiser.close()


@pytest.mark.slow
def test_a_pipeline_is_calibrated() -> None:
    pipe = reference.pipeline(SPEC)
    handle = asyncdiff.parallelize(
        pipe, devices=["cpu"] * 2, split="estimate", schedule="wavefront"
    )
    inputs = reference.inputs(SPEC)
    latents = inputs["latents"].repeat(8, 1, 1, 1) + torch.randn(
        8, *inputs["latents"].shape[1:], generator=torch.manual_seed(0)
    )
    options = {
        "prompt_embeds": inputs["prompt_embeds"].repeat(8, 1, 1),
        "negative_prompt_embeds": inputs["negative_prompt_embeds"].repeat(8, 1, 1),
        "latents": latents,
        "output_type": "latent",
        "guidance_scale": 4.0,
        "num_inference_steps": 6,
    }
    found = handle.calibrate(**options)
    assert len(found.coefficients) == 6 and handle.config.order is found
    got = pipe(**options).images
    want = reference.pipeline(SPEC)(**options).images
    assert reference.distance(got, want) < 0.5
    with pytest.raises(PlanError, match="made for 6 steps"):
        pipe(**options | {"num_inference_steps": 8})
    handle.denoiser.configure(warmup=2)
    with pytest.raises(PlanError, match="warmup=1, not 2"):
        pipe(**options)
    handle.denoiser.configure(order=None)
    pipe(**options)
    handle.restore()


def test_saved_and_read(tmp_path: Path) -> None:
    calibration = random_calibration(2, 1, 1)
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    assert hash(Calibration.load(tmp_path / "c.json")) == hash(calibration)
    text = (tmp_path / "c.json").read_text()
    for wrong in ("", "[]", "{}", text.replace('"version": 4', '"version": 3')):
        (tmp_path / "c.json").write_text(wrong)
        with pytest.raises(PlanError, match="is no calibration"):
            Calibration.load(tmp_path / "c.json")


def test_another_scheduler_is_refused(tmp_path: Path) -> None:
    """Of the same noise levels: how it steps is what a calibration is fitted to, too."""
    module, call = toy(), toy_call(batch=8)
    conditioning = {"encoder_hidden_states": call["encoder_hidden_states"]}
    scheduler = sampler_of("DDIMScheduler", STEPS)
    denoiser = waves(module, 2, 1)
    found = denoiser.calibrate(call["sample"], conditioning, scheduler)
    assert found.sampler["class"] == "DDIMScheduler"
    calibration = replace(random_calibration(2, 1, 1), sampler=found.sampler)
    calibration.save(tmp_path / "c.json")
    denoiser.configure(order=Calibration.load(tmp_path / "c.json"))
    denoiser.generate(call["sample"], conditioning, scheduler)
    other = type(scheduler).from_config(scheduler.config, clip_sample=True)
    other.set_timesteps(STEPS)
    with pytest.raises(PlanError, match=r"for DDIMScheduler\(clip_sample=False\), not .*=True\)"):
        denoiser.generate(call["sample"], conditioning, other)
    parallel = diffusers.DDIMParallelScheduler.from_config(scheduler.config)
    parallel.set_timesteps(STEPS)
    with pytest.raises(PlanError, match="for DDIMScheduler, not DDIMParallelScheduler: call"):
        denoiser.generate(call["sample"], conditioning, parallel)


def test_what_cannot_be_calibrated_says_why() -> None:
    module, call = toy(), toy_call(batch=8)
    conditioning = {"encoder_hidden_states": call["encoder_hidden_states"]}
    scheduler = sampler_of("DDIMScheduler", STEPS)
    published = AsyncDenoiser(module, devices=["cpu"] * 2, split=SPLITS[2])
    with pytest.raises(PlanError, match="take schedule='wavefront'"):
        published.calibrate(call["sample"], conditioning, scheduler)
    denoiser = waves(module, 2, 1)
    one = {k: v[:1] for k, v in conditioning.items()}
    with pytest.raises(InputError, match="at least 8 pictures"):
        denoiser.calibrate(call["sample"][:1], one, scheduler)
    with pytest.raises(InputError, match="nothing was captured"):  # said before any work
        _ = denoiser.partition
    clipping = diffusers.DDIMScheduler()
    clipping.set_timesteps(STEPS)
    with pytest.raises(SchedulerError):
        denoiser.calibrate(call["sample"], conditioning, clipping)
    denoiser.configure(warmup="auto")
    with pytest.raises(PlanError, match="fixed number of exact steps"):
        denoiser.calibrate(call["sample"], conditioning, scheduler)
    denoiser.configure(warmup=STEPS + 1)  # more than this generation has
    with pytest.raises(PlanError):
        denoiser.calibrate(call["sample"], conditioning, scheduler)
    # What failed left everything as it was.
    denoiser.configure(warmup=1)
    assert denoiser.config.order is None
    denoiser.generate(call["sample"], conditioning, scheduler)
    mine = random_calibration(2, 1, 1)
    other = dataclasses.replace(mine, shape=dataclasses.replace(mine.shape, components=3))
    with pytest.raises(PlanError, match="components=3, not 2"):
        denoiser.configure(order=other)
        denoiser.generate(call["sample"], conditioning, scheduler)
    with pytest.raises(PlanError, match="order"):
        waves(module, 2, 1, order="best")
