"""The pipeline schedule: exact, one picture after another, whatever the sampler does meanwhile."""

from __future__ import annotations

import inspect
import logging
import warnings
from typing import Any

import diffusers
import pytest
import torch
from toys import toy

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError, PlanError, RankError
from asyncdiff.graph.batch import BatchSplit
from asyncdiff.microbatches import Layout, MicroBatched

SPLITS = {
    2: [["enter", "down"], ["mix", "up", "leave"]],
    3: [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]],
}
TIMES = torch.tensor([900 - 100 * k for k in range(6)])


def inputs(pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of some pictures, and the text of both conditions of each."""
    random = torch.Generator().manual_seed(5)
    latents = torch.randn(pictures, 4, 8, 8, dtype=torch.float64, generator=random)
    text = torch.randn(2 * pictures, 3, 6, dtype=torch.float64, generator=random)
    return latents, text


def spread(components: int = 2, **settings: Any) -> AsyncDenoiser:
    settings = {"schedule": "pipeline", "split": SPLITS[components]} | settings
    devices = ["cpu"] * components
    return AsyncDenoiser(toy(), components=components, devices=devices, **settings)


def draw(denoise: Any, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """A guided generation whose sampler has a memory."""
    before = torch.zeros_like(latents)
    for t in TIMES:
        noise = denoise(torch.cat([latents, latents]), t, encoder_hidden_states=text)[0]
        without, given = noise.chunk(2)
        noise = without + 3.0 * (given - without)
        latents, before = latents - 0.1 * noise - 0.02 * before, noise
    return latents


def one_after_another(latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    pictures = len(latents)
    drawn = [draw(toy(), latents[i : i + 1], text[[i, pictures + i]]) for i in range(len(latents))]
    return torch.cat(drawn)


@pytest.mark.parametrize(
    ("components", "pictures", "count"), [(2, 2, 2), (2, 4, 2), (2, 3, 3), (3, 6, 3), (3, 2, 2)]
)
def test_equals_one_picture_after_another(components: int, pictures: int, count: int) -> None:
    denoiser = spread(components)
    latents, text = inputs(pictures)
    for _ in range(2):
        with denoiser.generation(TIMES):
            got = draw(denoiser, latents, text)
        assert isinstance(got, MicroBatched)
        assert got.parts is not None, "no step waited for all pictures"
        assert len(got.parts) == count
        torch.testing.assert_close(
            got.clone(), one_after_another(latents, text), rtol=1e-12, atol=1e-12
        )
    assert denoiser.report().ticks == count * len(TIMES)
    assert denoiser.plan(5).microbatches == components
    denoiser.close()


def test_no_guidance_and_other_prompts() -> None:
    denoiser = spread()
    module = toy()
    random = torch.Generator().manual_seed(1)
    for _ in range(2):
        x = torch.randn(4, 4, 8, 8, dtype=torch.float64, generator=random)
        text = torch.randn(4, 3, 6, dtype=torch.float64, generator=random)
        want = x
        with denoiser.generation(TIMES):
            for t in TIMES:
                x = x - 0.1 * denoiser(x, t, encoder_hidden_states=text)[0]
                want = want - 0.1 * module(want, t, encoder_hidden_states=text)[0]
        assert x.parts is not None  # type: ignore[attr-defined]
        torch.testing.assert_close(x.joined(), want, rtol=1e-12, atol=1e-12)  # type: ignore[attr-defined]
    denoiser.close()


def test_a_text_written_to_in_between_is_seen() -> None:
    denoiser, module = spread(), toy()
    latents, text = inputs(2)
    plain, mine = text.clone(), text.clone()
    got = want = latents
    with denoiser.generation(TIMES):
        for k, t in enumerate(TIMES):
            if k == 3:
                plain.mul_(2)
                mine.mul_(2)
            noise = denoiser(torch.cat([got, got]), t, encoder_hidden_states=mine)[0]
            got = got - 0.1 * noise.chunk(2)[1]
            noise = module(torch.cat([want, want]), t, encoder_hidden_states=plain)[0]
            want = want - 0.1 * noise.chunk(2)[1]
    torch.testing.assert_close(got.clone(), want, rtol=1e-12, atol=1e-12)
    denoiser.close()


def test_too_few_pictures_are_said_and_exact(caplog: pytest.LogCaptureFixture) -> None:
    denoiser = spread()
    latents, text = inputs(1)
    with caplog.at_level(logging.WARNING, "asyncdiff"), denoiser.generation(TIMES):
        got = draw(denoiser, latents, text)
    assert "takes 2 pictures to keep 2 components busy, and this batch has 1" in caplog.text
    torch.testing.assert_close(
        got.clone(), one_after_another(latents, text), rtol=1e-12, atol=1e-12
    )
    denoiser.close()


def test_a_rank_that_raises_stops_it_and_the_next_generation_works() -> None:
    denoiser = spread()
    latents, text = inputs(2)
    with denoiser.generation(TIMES):
        want = draw(denoiser, latents, text)
    worker = denoiser._engine.workers[3]  # type: ignore[union-attr]
    sound, worker.run = worker.run, lambda slots: 1 / 0
    with pytest.raises(RankError, match="ZeroDivisionError"), denoiser.generation(TIMES):
        draw(denoiser, latents, text)
    worker.run = sound
    with denoiser.generation(TIMES):
        torch.testing.assert_close(draw(denoiser, latents, text), want, rtol=0, atol=0)
    denoiser.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stride": 2}, "stride does not go with schedule='pipeline'"),
        ({"exact_tail": 1}, "exact_tail does not go with"),
        ({"time_shift": True}, "time_shift does not go with"),
        ({"extrapolate": 1.0}, "extrapolate does not go with"),
        ({"delay": 1}, "delay belongs to schedule='wavefront'"),
        ({"order": 1.0}, "order belongs to schedule='wavefront'"),
        ({"guidance": "split"}, "keeps the conditions of a picture together"),
        ({"exact_mode": "split"}, "keeps the conditions of a picture together"),
    ],
)
def test_what_it_does_not_have_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        asyncdiff.ParallelConfig(schedule="pipeline", **settings)


class Mixing(torch.nn.Module):
    """Pictures of its batch know of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, sample: Any, timestep: Any) -> tuple[torch.Tensor]:
        return (self.second(self.first(sample) + sample.mean(0, keepdim=True)),)


def test_pictures_that_know_of_each_other_are_refused() -> None:
    denoiser = AsyncDenoiser(
        Mixing().double().eval(),
        devices=["cpu"] * 2,
        split=[["first"], ["second"]],
        schedule="pipeline",
    )
    with (
        pytest.raises(InputError, match="mixes the pictures of the batch, which schedule='pipe"),
        denoiser.generation(TIMES),
    ):
        denoiser(torch.randn(2, 4, 8, 8, dtype=torch.float64), TIMES[0])
    denoiser.close()


# ---- the batch in parts --------------------------------------------------------------------------


def in_parts(whole: torch.Tensor, conditions: int = 1, count: int = 3) -> MicroBatched:
    layout = Layout(conditions, count, (None,) * count)
    return MicroBatched.of(layout, [p.clone() for p in layout.parts(whole)])


def samplers() -> list[str]:
    """Schedulers of diffusers that take latents and a noise prediction."""
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    found = []
    for name in names:
        kind = getattr(diffusers, name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler = kind()
                scheduler.set_timesteps(4)
                x = torch.randn(1, 4, 8, 8)
                scheduler.step(x, scheduler.timesteps[0], x, return_dict=False)
        except Exception:  # another kind of scheduler, or what it needs is not installed
            continue
        found.append(name)
    return found


@pytest.mark.filterwarnings("ignore")  # of diffusers' own code
@pytest.mark.parametrize("name", samplers())
def test_any_sampler_takes_it_for_a_tensor(name: str) -> None:
    def run(parts: bool) -> torch.Tensor:
        torch.manual_seed(3)
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(5)
        random = torch.Generator().manual_seed(0)
        z = torch.randn(3, 4, 8, 8, generator=random)
        options = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            x = torch.cat([z, z])
            if hasattr(scheduler, "scale_model_input"):
                x = scheduler.scale_model_input(x, t)
            noise = torch.tanh(x.clone())
            if parts and not isinstance(noise, MicroBatched):
                noise = in_parts(noise, conditions=2)
            without, given = noise.chunk(2)
            noise = without + 3.0 * (given - without)
            z = scheduler.step(noise, t, z, **options, return_dict=False)[0]
        return z.joined() if isinstance(z, MicroBatched) else z

    assert torch.equal(run(parts=True), run(parts=False))


def test_what_treats_samples_alike_keeps_the_parts() -> None:
    whole = torch.randn(12, 4, 8, 8)
    for conditions in (1, 2):
        x = in_parts(whole, conditions)
        kept = {
            "arithmetic": (x * 2 - x / 3, whole * 2 - whole / 3),
            "a row each": (x * torch.arange(12.0).view(12, 1, 1, 1),
                           whole * torch.arange(12.0).view(12, 1, 1, 1)),
            "dtype": (x.to(torch.float64), whole.to(torch.float64)),
            "channels": (x[:, :3], whole[:, :3]),
            "statistics": (x.std(dim=[1, 2, 3], keepdim=True),
                           whole.std(dim=[1, 2, 3], keepdim=True)),
            "stacked": (torch.stack([x, x], 1), torch.stack([whole, whole], 1)),
            "beside": (torch.cat([x, whole], 1), torch.cat([whole, whole], 1)),
            "shape": (x.flatten(1).unflatten(1, (8, 32)), whole.flatten(1).unflatten(1, (8, 32))),
            "dimensions": (x.permute(0, 2, 3, 1), whole.permute(0, 2, 3, 1)),
        }  # fmt: skip
        for what, (got, want) in kept.items():
            assert isinstance(got, MicroBatched), what
            assert got.parts is not None, what
            torch.testing.assert_close(got.joined(), want, rtol=0, atol=0)
        a, b = in_parts(whole, 2).chunk(2)
        assert a.cut.conditions == b.cut.conditions == 1  # type: ignore[attr-defined]
        assert torch.equal(torch.cat([a, b]).joined(), whole)  # type: ignore[attr-defined]


def test_anything_else_joins_them() -> None:
    whole = torch.randn(6, 4, 2, 2)
    assert torch.equal(in_parts(whole)[1], whole[1])
    assert torch.equal(in_parts(whole).flip(0), whole.flip(0))
    assert float(in_parts(whole).mean()) == float(whole.mean())
    assert in_parts(whole).tolist() == whole.tolist()
    assert (in_parts(whole).numpy() == whole.numpy()).all()
    conv = torch.nn.Conv2d(4, 2, 1).requires_grad_(False)
    assert torch.equal(conv(in_parts(whole)), conv(whole))
    assert torch.equal(torch.zeros_like(in_parts(whole)), torch.zeros_like(whole))
    torch.manual_seed(0)
    noise = torch.randn_like(whole)
    torch.manual_seed(0)
    x = in_parts(whole)
    assert torch.equal(torch.randn_like(x), noise)
    assert x.parts is not None  # which nothing had to look at


def test_it_has_the_layout_of_its_parts() -> None:
    whole = torch.randn(8, 4, 6, 6)
    x = in_parts(whole, 2, 2)
    got = x.reshape(8, 2, 2, 6, 6).permute(0, 2, 1, 3, 4)
    assert not got.is_contiguous()
    want = whole.reshape(8, 2, 2, 6, 6).permute(0, 2, 1, 3, 4)
    assert torch.equal(got.reshape(8, 4, 36).clone(), want.reshape(8, 4, 36))
    assert torch.equal(x[:, :3].flatten(1).clone(), whole[:, :3].flatten(1))
    assert torch.equal(x, x)
    assert torch.equal(in_parts(whole).view(torch.int32), whole.view(torch.int32))


def test_writes_are_seen() -> None:
    whole = torch.randn(6, 4, 2, 2)
    x = in_parts(whole)
    x.mul_(2)
    x[:, :2] = 1.0
    want = whole * 2
    want[:, :2] = 1.0
    assert torch.equal(x.clone().joined(), want)  # type: ignore[attr-defined]
    x[2] = 5.0  # joins them
    x += 1
    want[2] = 5.0
    want += 1
    assert torch.equal(x.joined(), want)
    x.sub_(whole.flip(0))
    want.sub_(whole.flip(0))
    assert torch.equal(x.joined(), want)


def test_views_see_writes_or_say_that_they_cannot() -> None:
    whole = torch.randn(6, 4, 2, 2)
    x = in_parts(whole)
    x[:, :2].cumsum_(1)  # of the whole, and no operation that goes by parts
    want = whole.clone()
    want[:, :2].cumsum_(1)
    assert torch.equal(x.clone().joined(), want)  # type: ignore[attr-defined]
    writes: tuple[Any, ...] = (lambda x, some: some.add_(1), lambda x, some: x[0].add_(1))
    for write in writes:
        x = in_parts(whole)
        some = x[:, :2]
        x.joined()
        assert torch.equal(some.clone().joined(), whole[:, :2])  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="in use after the batch was looked at as a whole"):
            write(x, some)
            some.add(1)


def test_a_batch_is_cut_picture_by_picture() -> None:
    split = BatchSplit(conditions=2, count=2)
    rows = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])  # two frames of each picture
    assert [p.tolist() for p in split.parts(rows)] == [[0, 1, 10, 11], [2, 3, 12, 13]]
    assert torch.equal(split.join(split.parts(rows)), rows)
