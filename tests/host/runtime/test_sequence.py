"""Ranks that share out the tokens of a denoiser give what it gives by itself."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
import quantized
import sequence
import torch
from families import FAMILIES
from torch import fx
from toys import attention, attention_call, toy, toy_call

import asyncdiff_core as core
from asyncdiff import (
    AsyncDenoiser,
    DeviceError,
    ParallelConfig,
    PlanError,
    RankError,
    TokensError,
)
from asyncdiff.generation.spec import GenerationSpec
from asyncdiff.runtime.exchange import meetings
from asyncdiff.runtime.exchange.gathering import brief_meetings
from asyncdiff.runtime.exchange.meetings import Meetings

#: Of a generation.
STEPS = 4
#: Of other families tiny versions have too few tokens for more ranks than two.
RANKS = {"FLUX": (2, 3, 4), "SD3": (2, 3, 4)}
OFTEN = ("FLUX", "SD3", "Wan 2.1")
SELDOM = ("Hunyuan Video", "FLUX.2", "Qwen-Image", "LTX", "CogVideoX")
CASES = [
    pytest.param(name, ranks, marks=[] if name in OFTEN and ranks < 4 else pytest.mark.slow)
    for name in (*OFTEN, *SELDOM)
    for ranks in RANKS.get(name, (2,))
]


def _check(name: str, devices: int, **settings: Any) -> Any:
    """The report of a second generation; each step's result is the plain one."""
    _, call, expected = sequence.of_family(name)
    module, given = FAMILIES[name]()[0].transformer, call.kwargs(call.tensors)
    time = next(given[n] for n in ("timestep", "timesteps", "t") if n in given).flatten()[:1]
    made = AsyncDenoiser(module, devices=["cpu"] * devices, split="estimate", **settings)
    with contextlib.closing(made) as denoiser:
        for _ in range(2):
            with denoiser.generation(time.expand(STEPS)):
                results = [denoiser(**given) for _ in range(STEPS)]
            for result in results:
                got = torch.utils._pytree.tree_leaves(result)
                for x, wanted in zip(got, expected, strict=True):
                    most = 1e-5 * float(wanted.abs().max())
                    torch.testing.assert_close(x, wanted, rtol=0, atol=most)
        return denoiser.report()


@pytest.mark.parametrize("name, ranks", CASES)
def test_every_step_by_tokens(name: str, ranks: int) -> None:
    report = _check(name, ranks, schedule="sequence", components=ranks)
    assert report.ticks == STEPS
    # Each rank gives its keys and values to all others, in each step.
    assert report.exchange_bytes == STEPS * report.exchange_bytes_per_tick > 0


def test_one_rank_meets_nobody() -> None:
    report = _check("FLUX", 1, schedule="sequence", components=1)
    assert report.exchange_bytes == 0


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_without_text(ranks: int) -> None:
    """They are not given what it alone needs, take what they need of it, and give no empty values;
    where only one rank has any keys, or none needs them, too."""
    module, call = sequence.streams(), sequence.streams_call(4, 8)
    settings: dict[str, Any] = {"schedule": "sequence", "components": ranks}
    made = AsyncDenoiser(module, devices=["cpu"] * ranks, **settings)
    with torch.no_grad(), contextlib.closing(made) as denoiser:
        want = module(**call)[0]
        for _ in range(2):
            with denoiser.generation([900] * STEPS):
                for _ in range(STEPS):
                    got = denoiser(**call)[0]
                    most = 1e-5 * float(want.abs().max())
                    torch.testing.assert_close(got, want, rtol=0, atol=most)


@pytest.mark.slow
@pytest.mark.parametrize("name, ranks", [("FLUX", 2), ("SD3", 2), ("SD3", 4)])
def test_compiled_by_regions(name: str, ranks: int) -> None:
    """With four ranks keys lie otherwise on those that have text, too."""
    _check(name, ranks, schedule="sequence", components=ranks, compile="regions")


def test_two_ranks_put_together_where_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of each attention, also of two pictures, and of heads before tokens; not the
    result, which is used after the run."""
    made: list[int] = []

    class Counted(Meetings):
        def __init__(self, *args: Any) -> None:
            made.append(sum(map(bool, args[4])))
            super().__init__(*args)

    monkeypatch.setattr(meetings, "Meetings", Counted)
    _check("FLUX", 2, schedule="sequence", components=2)
    assert made == [4, 4]
    made.clear()
    _check("FLUX", 3, schedule="sequence", components=3)
    assert made == [0, 0, 0]
    made.clear()
    _check("SD3", 2, schedule="sequence", components=2)
    assert made == [3, 3]
    made.clear()
    # Of GPUs without peer access: all of a bundle is copied out of host memory.
    monkeypatch.setattr(core.HostFabric, "links", lambda _: {(0, 1): "staged", (1, 0): "staged"})
    _check("FLUX", 2, schedule="sequence", components=2)
    assert made == [0, 0]


def _three_meetings(later: int) -> fx.Graph:
    """A program in which the value of one meeting, but the last, is used after the next one."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    views: dict[int, fx.Node] = {}
    for number in range(3):
        taken = graph.call_module("meet", (number, 0, x, 1, 8))
        views[number] = graph.call_function(torch.ops.aten.narrow.default, (taken, 0, 0, 1))
        used = views[later if number == later + 1 else number]
        x = graph.call_function(torch.ops.aten.neg.default, (used,))
    graph.output(x)  # no view
    return graph


def test_what_is_used_later_is_not_left_in_the_mailbox() -> None:
    first, second = _three_meetings(0), _three_meetings(1)
    assert brief_meetings([first]) == {1: [1], 2: [1]}
    assert brief_meetings([second]) == {0: [1], 2: [1]}
    # Ranks may have other programs: what none of them needs later is left there.
    assert brief_meetings([first, second]) == {2: [1]}


def test_exact_steps_of_a_plan_by_tokens() -> None:
    # All inputs are the same in each step: then asynchronous steps give the plain result, too.
    report = _check("FLUX", 2, components=2, warmup=2, exact_tail=1, exact_mode="sequence")
    assert report.warmup == 2 and report.ticks == STEPS
    _check("FLUX", 2, components=2, warmup=STEPS, exact_mode="sequence")


@pytest.mark.slow
def test_conditions_and_tokens_are_both_shared_out() -> None:
    settings = {"guidance": "split", "components": 2}
    _check("SD3", 4, schedule="sequence", **settings)
    _check("SD3", 4, warmup=3, exact_mode="sequence", **settings)


def test_a_denoiser_whose_tokens_cannot_be_followed_is_refused() -> None:
    module, call = toy(), toy_call(2)
    settings: dict[str, Any] = {"schedule": "sequence", "components": 2}
    denoiser = AsyncDenoiser(module, devices=["cpu"] * 2, **settings)
    with (
        contextlib.closing(denoiser),
        pytest.raises(TokensError, match="tokens"),
        denoiser.generation([0.5]),
    ):
        denoiser(**call)


def _by_hand(**settings: Any) -> AsyncDenoiser:
    settings = {"schedule": "sequence", "components": 3, "devices": ["cpu"] * 3} | settings
    return AsyncDenoiser(attention(), **settings)


def _steps(denoiser: AsyncDenoiser) -> torch.Tensor:
    call = attention_call()
    with denoiser.generation([900] * STEPS):
        drawn: torch.Tensor = [denoiser(**call)[0] for _ in range(STEPS)][-1]
    return drawn


def test_what_the_exchange_costs_is_not_measured() -> None:
    """Keys and values are exchanged inside of runs."""
    with contextlib.closing(_by_hand()) as denoiser:
        _steps(denoiser)
        report = denoiser.report()
    assert report.exposed_ms is None and report.exchange_bytes > 0
    assert "exposed not measured" in str(report)


@pytest.mark.parametrize("method", ["__call__", "take", "finish"])
def test_a_rank_that_fails_in_the_middle(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait no longer, and the next generation is right."""
    does = getattr(Meetings, method)
    count: list[int] = []

    def fail(self: Any, *args: Any) -> Any:
        if self._rank == 1:
            count.append(1)
            if len(count) == 3:
                raise ValueError("broken")
        return does(self, *args)

    with contextlib.closing(_by_hand(deadline=30)) as denoiser:
        want = _steps(denoiser)
        with monkeypatch.context() as patch:
            patch.setattr(Meetings, method, fail)
            begun = time.monotonic()
            with pytest.raises(RankError, match="broken") as caught:
                _steps(denoiser)
            assert caught.value.rank == 1 and time.monotonic() - begun < 10
        assert torch.equal(_steps(denoiser), want)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["torchao int8", "torchao int8 dynamic", "torchao float8 dynamic"])
def test_quantised_weights(
    kind: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of matrices, some of integers, which need rows enough on each rank."""
    monkeypatch.setattr(quantized, "_IMAGE", 40)
    monkeypatch.setattr(quantized, "_TEXT", 20)
    module = quantized.KINDS[kind][0](tmp_path)
    call = {
        n: torch.cat([v, -v][:batch]) if v.dim() == 3 or n == "pooled_projections" else v
        for n, v in quantized.arguments().items()
    }
    call["timestep"] = call["timestep"].expand(batch)
    with torch.no_grad():
        want = module(**call)[0]
    made = AsyncDenoiser(module, devices=["cpu"] * 3, schedule="sequence", components=3)
    with contextlib.closing(made) as denoiser, denoiser.generation([0.5] * 2):
        for _ in range(2):
            far = (denoiser(**call)[0] - want).norm()
        assert far < 1e-2 * want.norm()


def test_how_many_devices_are_needed_is_said_for_the_schedule() -> None:
    settings: dict[str, Any] = {"schedule": "sequence", "components": 2}
    for guidance, needed in (("batched", "components = 2"), ("split", "2 x components = 4")):
        with pytest.raises(DeviceError, match=f"3 devices for . ranks: {needed} entries"):
            AsyncDenoiser(toy(), devices=["cpu"] * 3, guidance=guidance, **settings)


def test_settings_that_say_it_twice_or_not_at_all() -> None:
    for settings in ({"exact_mode": "sequence"}, {"stride": 2}, {"exact_tail": 1}):
        with pytest.raises(PlanError, match="sequence"):
            ParallelConfig(schedule="sequence", **settings)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="pipeline"):
        ParallelConfig(schedule="pipeline", exact_mode="sequence")
    config = ParallelConfig(schedule="sequence", components=3, warmup=1)
    assert config.ranks == 3 and GenerationSpec.of(config, range(7)).all_exact


def test_what_a_run_had_taken_that_failed_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels are empty when the next generation begins: there is nothing to give back."""

    does = Meetings.__call__

    def fail(self: Any, meeting: int, *args: Any) -> None:
        if meeting == 1:  # with keys and values in hand
            raise ValueError("broken")
        does(self, meeting, *args)

    with contextlib.closing(_by_hand(components=2, devices=["cpu"] * 2)) as denoiser:
        want = _steps(denoiser)
        with monkeypatch.context() as patch:
            patch.setattr(Meetings, "__call__", fail)
            with pytest.raises(RankError):
                _steps(denoiser)
        assert torch.equal(_steps(denoiser), want)


def test_ranks_that_cannot_be_recorded_are_refused() -> None:
    """Launched one after another they would wait for what is launched after them."""
    stream: Any = object()
    mine = Meetings(1, stream, None, [], [], [[], []])
    with pytest.raises(DeviceError, match="rank 1 cannot be recorded as a CUDA graph"):
        mine.check(graphs=False)
    mine.check(graphs=True)


@pytest.mark.parametrize(
    "queues, devices, told",
    [
        ("", ["cuda:0"] * 2, []),
        ("", ["cuda:0"] * 3, ["0, 1, 2 meet on cuda:0 and share its queues (8)"]),
        ("", ["cuda:0", "cuda:1"] * 2, []),
        ("", ["cuda:1"] * 4 + ["cuda:0"], ["0, 1, 2, 3 meet on cuda:1"]),
        ("1", ["cuda:0", "cuda:1"], []),
        ("1", ["cuda:0"] * 2, ["0, 1 meet on cuda:0 and share its queues (1)"]),
        ("32", ["cuda:0"] * 4, []),
        ("100", ["cuda:0"] * 11, ["share its queues (32)"]),
        ("nine", ["cuda:0"] * 3, ["and share its queues (8)"]),
        ("", ["cpu"] * 4, []),
    ],
)
def test_ranks_that_share_too_few_queues(
    queues: str,
    devices: list[str],
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One queue may bring what a rank gives behind another rank's wait for it."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", queues)
    meetings.warn_of_queues({r: torch.device(d) for r, d in enumerate(devices)})
    assert len(caplog.messages) == len(told)
    for message, part in zip(caplog.messages, told, strict=True):
        assert part in message and "CUDA_DEVICE_MAX_CONNECTIONS=32" in message
