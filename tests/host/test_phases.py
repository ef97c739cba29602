"""What preparing costs, by phase."""

from __future__ import annotations

import contextlib
import time

import pytest
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser
from asyncdiff import phases as module
from asyncdiff.phases import PHASES, phase, recording
from asyncdiff.progress import within


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only we move."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_phases_count_without_what_is_inside(clock: list[float]) -> None:
    with phase("export"):  # nobody asks
        clock[0] += 1
    with recording() as spent:
        clock[0] += 1
        with phase("build"):
            clock[0] += 2
            with phase("compile"):
                clock[0] += 4
            with recording() as inner, phase("capture"):
                clock[0] += 8
            clock[0] += 16
        with phase("build"):
            clock[0] += 32
    assert inner.phases == {"capture": 8} and inner.total == 8
    assert spent.phases == {"compile": 4, "capture": 8, "build": 50} and spent.total == 63
    assert list(spent.in_order()) == ["build", "compile", "capture"]


def test_as_a_decorator_and_with_errors(clock: list[float]) -> None:
    @phase("cut")
    def work() -> None:
        clock[0] += 1
        raise ValueError

    with recording() as spent:
        for _ in range(2):
            with contextlib.suppress(ValueError):
                work()
    assert spent.phases == {"cut": 2}


def test_preparing_has_its_phases() -> None:
    heard: list[str] = []
    with recording() as spent, within(lambda what, *_: heard.append(what)):
        started = time.perf_counter()
        denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2)
        with contextlib.closing(denoiser):
            denoiser.prepare(**toy_call())
        took = time.perf_counter() - started
    assert {"export", "measure", "cut", "build"} <= spent.phases.keys() <= set(PHASES)
    told = ["exporting the denoiser", "timing the denoiser's parts"]
    told += ["cutting the denoiser", "making ranks ready", "timing the components"]
    assert list(dict.fromkeys(heard)) == told
    assert sum(spent.phases.values()) <= spent.total and spent.total >= took
