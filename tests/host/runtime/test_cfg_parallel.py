"""Guidance split: two groups of ranks give what one gives, for asynchronous and for exact steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from rotation import often
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError, PlanError, RankError

SPLITS = {
    1: [["enter", "down", "mix", "up", "leave"]],
    2: [["enter", "down"], ["mix", "up", "leave"]],
    3: [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]],
}

SCHEDULER = DDIMScheduler(clip_sample=False)
SCHEDULER.set_timesteps(8)
TIMES = SCHEDULER.timesteps


def spread(components: int = 2, **settings: Any) -> AsyncDenoiser:
    stride = 1 if settings.get("schedule") == "wavefront" else settings.get("stride", 1)
    ranks = components + stride - 1
    ranks *= 2 if settings.get("guidance") == "split" else 1
    split = SPLITS[components]
    return AsyncDenoiser(
        toy(), devices=["cpu"] * ranks, components=components, split=split, **settings
    )


def run(denoiser: AsyncDenoiser, batch: int = 2) -> torch.Tensor:
    call = toy_call(batch=batch)
    latents = call["sample"]
    with denoiser.generation(TIMES, SCHEDULER):
        for k, t in enumerate(TIMES):
            (noise,) = denoiser(latents, t, encoder_hidden_states=call["encoder_hidden_states"])
            latents = latents - (0.1 + 0.01 * k) * noise
    return latents


MODES = {
    "guidance": {"guidance": "split"},
    "warmup": {"exact_mode": "split"},
    "both": {"guidance": "split", "exact_mode": "split"},
}
NUMBERS = [(1, 1, 1), (2, 1, 1), (2, 2, 3), (3, 1, 4), (3, 2, 8)]
SCHEDULES = [("asyncdiff", 0), ("asyncdiff", 2), ("wavefront", 2)]
ALL = list(itertools.product(SCHEDULES, MODES, NUMBERS))
#: Tried every time: each schedule with both, and each mode with an exact tail.
OFTEN = [one for one in ALL if one[1] == "both" or one[0] == ("asyncdiff", 2)]


@pytest.mark.parametrize(("schedule", "mode", "numbers"), often(OFTEN, ALL), ids=str)
def test_equals_one_group(
    schedule: tuple[str, int], mode: str, numbers: tuple[int, int, int]
) -> None:
    (kind, tail), modes, (components, stride, warmup) = schedule, MODES[mode], numbers
    alone = components == 1 and (stride == 1 or kind == "wavefront")
    if alone and "guidance" not in modes:
        pytest.skip("one rank has nobody to split its exact steps with")
    tail = min(tail, 8 - warmup)
    settings = {"components": components, "stride": stride, "warmup": warmup, "exact_tail": tail}
    settings["schedule"] = kind
    one, two = spread(**settings), spread(**settings, **modes)
    want = run(one)
    torch.testing.assert_close(run(two), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(two), want, rtol=1e-12, atol=1e-12)  # and a second time
    told, wanted = two.report(), one.report()
    assert (told.steps, told.warmup, told.components) == (8, warmup, components)
    assert told.ticks == wanted.ticks
    # A batch sends as many bytes in halves as in one; exact steps that run whole send none.
    assert told.exchange_bytes_per_tick == wanted.exchange_bytes_per_tick
    if "exact_mode" in modes and warmup + tail > 1:
        assert told.exchange_bytes < wanted.exchange_bytes or components == 1
    else:
        assert told.exchange_bytes == wanted.exchange_bytes
    one.close()
    two.close()


def test_conditioning_is_copied_once_and_changes_are_seen() -> None:
    split, plain = spread(guidance="split"), spread()
    call = toy_call()
    results = []
    for denoiser in (split, plain):
        text = call["encoder_hidden_states"].clone()
        latents = call["sample"]
        with denoiser.generation(TIMES):
            for k, t in enumerate(TIMES):
                if k == 4:
                    text.mul_(2)
                (noise,) = denoiser(latents, t, encoder_hidden_states=text)
                latents = latents - 0.1 * noise
        results.append(latents)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    split.close()
    plain.close()


def test_larger_batches_are_halved() -> None:
    split, plain = spread(guidance="split"), spread()
    torch.testing.assert_close(run(split, batch=6), run(plain, batch=6), rtol=1e-12, atol=1e-12)
    split.close()
    plain.close()


class Sized(torch.nn.Module):
    """Takes the size of the picture, which is as long as a batch of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, sample: Any, timestep: Any, size: Any) -> tuple[torch.Tensor]:
        x = self.first(sample) + timestep / 1000
        return (self.second(x * size.to(x.dtype).mean() / 80),)


@pytest.mark.parametrize("modes", [{"guidance": "split"}, {"exact_mode": "split"}])
@pytest.mark.parametrize("size", [[64, 96], [64, 64]])
def test_what_is_as_long_as_the_batch_by_accident_is_shared(
    modes: dict[str, str], size: list[int]
) -> None:
    torch.manual_seed(0)
    module = Sized().double().eval().requires_grad_(False)
    ranks = 4 if "guidance" in modes else 2
    split = [["first"], ["second"]]
    denoiser = AsyncDenoiser(module, devices=["cpu"] * ranks, split=split, warmup=8, **modes)
    sample = toy_call()["sample"]
    for sizes in (torch.tensor(size), torch.tensor([64, 96])):
        with denoiser.generation(TIMES):
            for t in TIMES:
                got = denoiser(sample, t, size=sizes)[0]
                torch.testing.assert_close(got, module(sample, t, sizes)[0], rtol=1e-12, atol=1e-12)
    denoiser.close()


def test_a_rank_that_raises_stops_both_groups_and_the_next_generation_works() -> None:
    denoiser = spread(guidance="split")
    want = run(denoiser)
    worker = denoiser._engine.workers[3]  # type: ignore[union-attr]
    sound, worker.run = worker.run, lambda slots: 1 / 0
    with pytest.raises(RankError, match="ZeroDivisionError"):
        run(denoiser)
    worker.run = sound
    torch.testing.assert_close(run(denoiser), want, rtol=0, atol=0)
    denoiser.close()


def test_what_cannot_be_split_is_refused() -> None:
    denoiser = spread(guidance="split")
    with pytest.raises(InputError, match=r"batch of 1: pass guidance_scale > 1"):
        run(denoiser, batch=1)
    with pytest.raises(InputError, match=r"batch of 3"):
        run(denoiser, batch=3)
    denoiser.close()
    with pytest.raises(asyncdiff.DeviceError, match=r"2 x \(components \+ stride - 1\) = 4"):
        AsyncDenoiser(toy(), devices=["cpu"] * 2, guidance="split")
    with pytest.raises(InputError, match="write 'batched' or 'split'"):
        spread(guidance="half")
    with pytest.raises(InputError, match="write 'chain' or 'split'"):
        spread(exact_mode="half")
    with pytest.raises(PlanError, match="needs two ranks"):
        spread(1, exact_mode="split")
    late = spread(warmup=9, exact_mode="split")
    with pytest.raises(PlanError, match="warmup=9 exceeds the 8 steps"):
        run(late)
    late.close()
