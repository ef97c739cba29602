"""What is told of long preparations, and to whom."""

from __future__ import annotations

import io
import sys
import time
from typing import Any

import pytest
from export_cache import uncached
from toys import toy, toy_call

import asyncdiff
from asyncdiff import progress
from asyncdiff.demo import model as demo_model
from asyncdiff.graph import capture


def test_stages_reach_whoever_listens() -> None:
    heard: list[tuple[str, int, int]] = []
    with progress.stage("nobody listens"):
        pass
    with progress.bar(lambda *told: heard.append(told)), progress.stage("one"):
        heard.append(("work", 0, 0))
    assert heard == [("one", 0, 1), ("work", 0, 0), ("one", 1, 1)]
    heard.clear()
    also: list[str] = []
    with (
        progress.within(lambda what, done, total: also.append(what)),
        progress.bar(lambda *told: heard.append(told)) as told,
    ):
        told("two", 3, 4)
    assert heard == [("two", 3, 4)] and also == ["two"]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.bar(None) as told, progress.stage("exporting"):
        told("counted", 1, 3)
    assert "exporting" in terminal.getvalue() and "counted" in terminal.getvalue()


def test_the_pipelines_own_bar_tells_of_preparing_and_does_not_count_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stood still, and then promised steps as slow as the preparation."""
    pipe: Any = demo_model.load()
    kind = type(pipe)
    bars: list[Any] = []
    plain = kind.progress_bar

    class Clock:
        """The bar's clock."""

        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()

    def watched(self: Any, *args: Any, **more: Any) -> Any:
        shown = plain(self, *args, **more)
        shown._time, shown.start_t, shown.last_print_t = clock, 0.0, 0.0
        bars.append(shown)
        said: list[str] = []
        shown.set_description_str = lambda text, refresh=True: said.append(text)
        shown.said = said
        return shown

    uncached(monkeypatch)
    export = capture.torch.export.export

    def slow(*args: Any, **more: Any) -> Any:
        clock.now += 100.0
        return export(*args, **more)

    monkeypatch.setattr(kind, "progress_bar", watched)
    monkeypatch.setattr(capture.torch.export, "export", slow)
    with asyncdiff.parallelize(pipe, ["cpu"] * 2, components=2):
        pipe("red heart", num_inference_steps=3)
        pipe("red heart", num_inference_steps=3)
    first, second = bars
    assert first.said[0] == "exporting the denoiser" and first.said[-1] == ""
    assert any(text.startswith("timing the denoiser's parts") for text in first.said)
    assert clock.now == 100.0 and clock.now - first.start_t < 1.0
    assert not second.said  # nothing was to be prepared


def test_a_bar_that_is_switched_off_stays_silent(capfd: pytest.CaptureFixture[str]) -> None:
    pipe: Any = demo_model.load()
    pipe.set_progress_bar_config(disable=True)
    heard: list[str] = []
    with asyncdiff.parallelize(
        pipe, ["cpu"] * 2, progress=lambda what, done, total: heard.append(what)
    ):
        started = time.perf_counter()
        pipe("red heart", num_inference_steps=2)
        assert time.perf_counter() > started
    assert capfd.readouterr().err == ""
    assert heard[0] == "exporting the denoiser"


def test_who_watches_is_told_of_everything_and_nobody_shows_it() -> None:
    seen: list[str] = []
    told: list[tuple[str, int, int]] = []
    with progress.watched(seen.append), progress.watched(seen.append):
        progress.heartbeat("a weight")
        with (
            progress.bar(lambda *what: told.append(what)),
            progress.stage("exporting the denoiser"),
        ):
            pass
    progress.heartbeat("nobody watches")
    stage = "exporting the denoiser"
    assert seen == ["a weight", f"{stage}: 0 of 1", f"{stage}: 1 of 1"]
    assert told == [(stage, 0, 1), (stage, 1, 1)]


def test_what_a_function_that_is_told_raises_is_its_own_error() -> None:
    """It was taken for the exporter's, and a quality then went on without its settings."""

    def told(what: str, done: int, total: int) -> None:
        raise KeyError(what)

    denoiser = asyncdiff.AsyncDenoiser(toy(), devices=["cpu"] * 2, split="estimate", progress=told)
    with pytest.raises(KeyError, match="exporting the denoiser"):
        denoiser.prepare(**toy_call())
    denoiser.close()
    with pytest.raises(asyncdiff.InputError, match="progress=3: pass a function"):
        asyncdiff.ParallelConfig(progress=3)  # type: ignore[arg-type]
