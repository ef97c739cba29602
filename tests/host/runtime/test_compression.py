"""Bundles that cross compressed: the codes, and engines that use them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from codecs_example import BAD, BAD_STEP, DTYPES, SIZES, check_wild, example, sent, wild
from toys import Toy, toy_call

from asyncdiff import AsyncDenoiser, InputError, ParallelConfig
from asyncdiff.graph.capture import capture
from asyncdiff.graph.signature import parse
from asyncdiff.partition.cost import estimate
from asyncdiff.partition.exposure import exposed_ms, worth_compressing
from asyncdiff.partition.links import Links
from asyncdiff.partition.partition import partition
from asyncdiff.runtime.cutting import cutter
from asyncdiff.runtime.exchange.compression import reference
from asyncdiff.runtime.exchange.compression.choice import Choice
from asyncdiff.runtime.exchange.compression.codec import (
    LARGEST,
    LEAST,
    crossing,
    crossing_nbytes,
)
from asyncdiff.runtime.exchange.compression.ends import PackingSender, UnpackingReceiver
from asyncdiff.runtime.exchange.compression.sent import Sent
from asyncdiff.schedule.plan import build

SPLITS = {
    2: [["enter", "down"], ["mix", "up", "leave"]],
    3: [["enter", "down.0"], ["down.1", "down.2", "mix"], ["up", "leave"]],
}
CIRCLE = [["down.1", "down.2", "mix"], ["enter", "down.0", "up", "leave"]]
STEPS = 10
KINDS = sorted(LARGEST)


# ---- codes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", SIZES)
def test_both_ends_make_the_same_of_codes(kind: str, dtype: torch.dtype, count: int) -> None:
    value, last, older, new, packed = example(dtype, count)
    reference.encode(value, last, older, new, packed, kind)
    # In the place of the older value, as where rings have two slots.
    reference.decode(packed, last, older, older, kind)
    assert torch.equal(older, new)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_at_most_half_a_code(kind: str) -> None:
    value, last, older, new, packed = example(torch.float32, SIZES[0])
    difference = (value - (last + (last - older))).view(-1, 64)
    reference.encode(value, last, older, new, packed, kind)
    error = (value - new).view(-1, 64).abs()
    top = difference.abs().amax(1, keepdim=True)
    # A float8 has three bits of a fraction, and below 2^-6 of them steps of 2^-9.
    share = top / 254 if kind == "int8" else torch.maximum(difference.abs() / 16, top / 448 / 1024)
    assert (error <= share * 1.01 + 1e-6).all()
    assert (error[4:8] == 0).all()  # what is as expected is exact


@pytest.mark.parametrize("kind", KINDS)
def test_errors_do_not_add_up(kind: str) -> None:
    """A value that stays is had exactly in the end."""
    value, last, older, new, packed = example(torch.float32, LEAST)
    ring = [older, last, new]
    errors = []
    for step in range(12):
        at = step % 3
        reference.encode(value, ring[at - 2], ring[at], ring[at - 1], packed, kind)
        errors.append((ring[at - 1] - value).abs().max().item())
    assert errors[-1] < 1e-5 < errors[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_arrives_as_nan(kind: str, bad: float) -> None:
    value, last, older, new, packed = example(torch.float32, LEAST)
    value[100] = bad
    reference.encode(value, last, older, new, packed, kind)
    reference.decode(packed, last, older, older, kind)
    assert new[100].isnan() and older[100].isnan()
    assert new[:64].isfinite().all() and new[128:].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_gone_with_the_next_value(kind: str, dtype: torch.dtype) -> None:
    """Nor does anything become so where codes round up past the largest number."""
    check_wild(sent(reference, wild(dtype, SIZES[2]), kind))


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_were_not_finite_are_made_good(kind: str) -> None:
    value, *_ = example(torch.float32, LEAST)
    values = [value.clone() for _ in range(BAD_STEP + 12)]
    for index, bad in BAD.items():
        values[BAD_STEP][index] = bad
    arrived = sent(reference, values, kind)
    assert (arrived[-1].value - value).abs().max() < 1e-5
    # Others of their blocks arrive as if nothing had been.
    others = [i for i in range(LEAST) if i not in BAD]
    whole = sent(reference, [value] * (BAD_STEP + 1), kind)
    torch.testing.assert_close(
        arrived[BAD_STEP].value[others], whole[BAD_STEP].value[others], rtol=0, atol=1e-2
    )


def test_a_byte_an_element_and_two_a_block_cross() -> None:
    assert crossing_nbytes(torch.bfloat16, 6400) == 6400 + 200
    assert crossing_nbytes(torch.bfloat16, LEAST - 1) == 2 * (LEAST - 1)
    assert crossing_nbytes(torch.float64, 6400) == 8 * 6400
    assert crossing_nbytes(torch.int64, 6400) == 8 * 6400


# ---- engines -------------------------------------------------------------------------------------


def toy(dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(0)
    return Toy().to(dtype).eval().requires_grad_(False)


def call(seed: int = 1, size: int = 16) -> dict[str, torch.Tensor]:
    """Of a size at which all that crosses is packed."""
    made = toy_call(size=size, seed=seed)
    return {k: v.float() if v.is_floating_point() else v for k, v in made.items()}


def run(denoiser: AsyncDenoiser, seed: int = 1, steps: int = STEPS, size: int = 16) -> torch.Tensor:
    given, scheduler = call(seed, size), diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    latents = given["sample"]
    with denoiser.generation(scheduler.timesteps, scheduler):
        for t in scheduler.timesteps:
            (noise,) = denoiser(latents, t, encoder_hidden_states=given["encoder_hidden_states"])
            latents = scheduler.step(noise, t, latents, return_dict=False)[0]
    return latents


def drawn(size: int = 16, **settings: Any) -> torch.Tensor:
    settings = {"devices": ["cpu"] * settings.pop("ranks", 2), "split": SPLITS[2], **settings}
    denoiser = AsyncDenoiser(toy(), **settings)
    try:
        return run(denoiser, size=size)
    finally:
        denoiser.close()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"warmup": 2},
        {"warmup": 1},
        {"warmup": 2, "exact_tail": 2},
        {"warmup": 2, "stride": 3, "ranks": 4},
        {"warmup": 2, "extrapolate": 0.5},
        {"warmup": 2, "components": 3, "split": SPLITS[3], "ranks": 3},
        {"warmup": 2, "schedule": "wavefront"},
        {
            "warmup": 2, "components": 3, "split": SPLITS[3], "ranks": 3,
            "schedule": "wavefront", "exact_tail": 1,
        },
        {
            "warmup": 2, "components": 3, "split": SPLITS[3], "ranks": 3,
            "schedule": "wavefront", "delay": 1,
        },
        {"warmup": 2, "split": CIRCLE},
        {"warmup": "auto"},
    ],
    ids=str,
)  # fmt: skip
def test_nearly_nothing_is_lost(kind: str, settings: dict[str, Any]) -> None:
    plain = drawn(**settings)
    lossy = drawn(compress=kind, **settings)
    stale = difference(plain, drawn(warmup=STEPS))
    assert 0 < difference(lossy, plain) < 0.02
    assert difference(lossy, plain) < 0.3 * stale


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_split_has_channels_of_its_own_for_each_condition(kind: str) -> None:
    settings = {"warmup": 2, "guidance": "split", "ranks": 4, "size": 32}
    assert 0 < difference(drawn(compress=kind, **settings), drawn(**settings)) < 0.02


def test_branches_do_not_know_of_each_other() -> None:
    """Guidance in two calls gives what each call gives alone."""

    def both(count: int) -> list[torch.Tensor]:
        denoiser = AsyncDenoiser(
            toy(), devices=["cpu"] * 2, split=SPLITS[2], warmup=2, compress="fp8"
        )
        given, times = [call(seed)["encoder_hidden_states"] for seed in range(count)], []
        latents = [call()["sample"]] * count
        times = torch.linspace(900, 0, STEPS)
        with denoiser.generation(times, branches=count):
            for t in times:
                for i, text in enumerate(given):
                    (noise,) = denoiser(latents[i], t, encoder_hidden_states=text)
                    latents[i] = latents[i] - 0.1 * noise
        denoiser.close()
        return latents

    assert torch.equal(both(2)[0], both(1)[0])


@pytest.mark.parametrize("kind", [*KINDS, "auto"])
def test_exact_steps_are_exact(kind: str) -> None:
    assert torch.equal(drawn(warmup=10, compress=kind), drawn(warmup=10))
    assert torch.equal(
        drawn(schedule="pipeline", split="estimate", compress=kind),
        drawn(schedule="pipeline", split="estimate"),
    )


def test_generations_do_not_know_of_earlier_ones() -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, split=SPLITS[2], warmup=2, compress="int8")
    first = run(denoiser)
    other = run(denoiser, seed=5, steps=7)
    assert torch.equal(run(denoiser), first)
    times = torch.linspace(900, 0, STEPS)
    with denoiser.generation(times):  # given up in the middle
        for t in times[:5]:
            denoiser(**call() | {"timestep": t})
    assert torch.equal(run(denoiser, seed=5, steps=7), other)
    assert torch.equal(run(denoiser), first)
    denoiser.close()


def test_both_ends_keep_the_same() -> None:
    denoiser = AsyncDenoiser(
        toy(), devices=["cpu"] * 3, split=SPLITS[2], stride=2, warmup=2, compress="fp8"
    )
    run(denoiser)
    first, *copies = denoiser._engine.workers  # type: ignore[union-attr]
    sender = first.senders[1]
    assert isinstance(sender, PackingSender)
    for copy in copies:
        receiver = copy.receivers[0]
        assert isinstance(receiver, UnpackingReceiver)
        for mine, theirs in zip(sender.values, receiver.values, strict=True):
            assert mine and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    denoiser.close()


def test_fewer_bytes_cross() -> None:
    settings = {"devices": ["cpu"] * 2, "split": SPLITS[2], "warmup": 2}
    mib = []
    for compress in (None, "fp8"):
        denoiser = AsyncDenoiser(toy(), compress=compress, **settings)
        run(denoiser)
        report = denoiser.report()
        mib.append(report.exchange_bytes_per_tick)
        # The first two steps, and 8 ticks, send whole bundles, and packed ones.
        assert report.exchange_bytes == 2 * mib[0] + 8 * mib[-1]
        denoiser.close()
    assert mib[1] < 0.27 * mib[0]


def test_small_values_cross_as_they_are() -> None:
    """And so does an engine none of whose values is packed."""
    settings = {"devices": ["cpu"] * 2, "split": SPLITS[2], "warmup": 2}
    results = []
    for compress in (None, "int8"):
        denoiser = AsyncDenoiser(toy(torch.float64), compress=compress, **settings)
        latents = toy_call()["sample"]
        times = torch.linspace(900, 0, STEPS)
        with denoiser.generation(times):
            for t in times:
                (noise,) = denoiser(**toy_call() | {"sample": latents, "timestep": t})
                latents = latents - 0.1 * noise
        results.append(latents)
        denoiser.close()
    assert torch.equal(*results)


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(InputError, match="compress='zip': write 'fp8', 'int8', 'auto', or None"):
        ParallelConfig(compress="zip")


# ---- where it pays -------------------------------------------------------------------------------


@pytest.mark.parametrize(("bytes_per_ms", "compressed"), [(1e9, False), (1e2, True)])
def test_auto_compresses_what_slow_links_expose(
    bytes_per_ms: float, compressed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutter, "engine_links", lambda *args: Links.alike(bytes_per_ms))
    settings = {"warmup": 2, "split": SPLITS[2]}
    same = torch.equal(drawn(compress="auto", **settings), drawn(**settings))
    assert same is not compressed
    if compressed:
        assert torch.equal(drawn(compress="auto", **settings), drawn(compress="fp8", **settings))


@pytest.mark.parametrize("edges", [{(0, 1)}, {(0, 2), (1, 2)}])
def test_of_several_boundaries_some_are_compressed(
    edges: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"components": 3, "split": SPLITS[3], "ranks": 3, "warmup": 2}
    plain, lossy = drawn(**settings), drawn(compress="fp8", **settings)
    monkeypatch.setattr(Choice, "_wanted", lambda *args: frozenset(edges))
    some = drawn(compress="auto", **settings)
    assert 0 < difference(some, plain) < 0.02 and not torch.equal(some, lossy)


def test_what_is_exposed() -> None:
    """A value that is computed last has nothing to hide behind."""
    captured = capture(toy(), parse(toy(), (), call()))
    parts = partition(captured, 2, SPLITS[2], costs=estimate(captured))
    (boundary,) = parts.boundaries.values()
    (first, second) = exposed_ms(parts, Links.alike(1e3))
    ms, nodes = parts.costs.ms, parts.components[0].nodes
    hidden = sum(ms[n] for n in nodes[nodes.index(boundary.values[0]) + 1 :])
    assert first == pytest.approx(boundary.nbytes / 1e3 - hidden) and second == 0
    assert exposed_ms(parts, Links.alike(1e3), crossing)[0] < 0.3 * first
    assert exposed_ms(parts, Links.alike(1e12))[0] == pytest.approx(0, abs=1e-4)
    assert worth_compressing(parts, Links.alike(1e3), crossing, 1e8) == {(0, 1)}
    assert worth_compressing(parts, Links.alike(1e9), crossing, 1e8) == frozenset()


def test_slow_links_are_cut_where_little_crosses() -> None:
    """And less has to be avoided where it is compressed."""
    captured = capture(toy(), parse(toy(), (), call()))
    costs = estimate(captured)

    def bytes_of(**how: Any) -> int:
        parts = partition(captured, 2, "auto", costs=costs, **how)
        return sum(b.nbytes for b in parts.boundaries.values())

    fast, slow = bytes_of(links=Links.alike(1e12)), bytes_of(links=Links.alike(1e4))
    assert slow < fast
    speeds = [10.0**n for n in range(4, 12)]
    for links in map(Links.alike, speeds):
        assert bytes_of(links=links) <= bytes_of(links=links, nbytes=crossing) <= fast


# ---- which channel a bundle takes ----------------------------------------------------------------


def test_channels_take_their_slots_in_turn() -> None:
    for schedule, components in (("asyncdiff", 2), ("wavefront", 3)):
        plan = build(components, 1, 3, 12, schedule=schedule, exact_tail=2)
        sent = Sent(plan.slots)
        for tick in plan.ticks:
            sent.add(tick)
        runs = [a for t in plan.ticks for a in t.runs if a.component == 0 and a.ordinal >= 0]
        exact = [tick.exact for tick in plan.ticks for a in tick.runs if a in runs]
        routes = [sent.route(0, run.ordinal) for run in runs]
        assert [r.whole for r in routes] == exact
        for whole in (True, False):
            slots = [r.slot for r in routes if r.whole is whole]
            assert slots == [n % plan.slots for n in range(len(slots))]
        assert [r.first for r in routes] == [True] + [False] * (len(routes) - 1)


# ---- kernels -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kernels_compute_what_the_reference_does() -> None:
    """In Triton's interpreter, where there is Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    program = Path(__file__).parents[2] / "codecs_interpreted.py"
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
