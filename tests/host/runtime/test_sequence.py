"""Ranks that share out the tokens of a denoiser give what it gives by itself."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import sequence
import torch
from families import FAMILIES
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser, DeviceError, ParallelConfig, PlanError, TokensError
from asyncdiff.runtime.exchange.meetings import Meetings

#: Of a generation.
STEPS = 4
#: Of other families tiny versions have too few tokens for more ranks than two.
RANKS = {"FLUX": (2, 3, 4), "SD3": (2, 3)}
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


def test_settings_that_say_it_twice_or_not_at_all() -> None:
    for settings in ({"exact_mode": "sequence"}, {"stride": 2}, {"exact_tail": 1}):
        with pytest.raises(PlanError, match="sequence"):
            ParallelConfig(schedule="sequence", **settings)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="pipeline"):
        ParallelConfig(schedule="pipeline", exact_mode="sequence")
    config = ParallelConfig(schedule="sequence", components=3, warmup=1)
    assert config.ranks == 3 and config.spec(range(7)).all_exact


def test_ranks_that_cannot_be_recorded_are_refused() -> None:
    """Launched one after another they would wait for what is launched after them."""
    stream: Any = object()
    meetings = Meetings(1, stream, None, [], [[], []])
    with pytest.raises(DeviceError, match="rank 1 cannot be recorded as a CUDA graph"):
        meetings.check(graphs=False)
    meetings.check(graphs=True)
