"""The first pictures do not wait for the engine, and are the plain pipeline's."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from export_cache import uncached
from tiny_pipelines import draw, tiny_flux, tiny_sd

import asyncdiff
from asyncdiff import progress
from asyncdiff.demo import model as demo_model
from asyncdiff.errors import CaptureError, InputError
from asyncdiff.integrations.diffusers import background
from asyncdiff.runtime.cutting import cutter, profiler
from asyncdiff.runtime.making import EngineMaker

SETTINGS: dict[str, Any] = {"devices": ["cpu"] * 2, "components": 2, "split": "estimate"}


class Coded(torch.nn.Parameter):
    """A weight that is more than its values."""


class Build:
    """Making ranks ready, which waits until it is let go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may = threading.Event(), threading.Event()
        self.calls = 0
        plain = EngineMaker._engine

        def waiting(*args: Any) -> Any:
            self.calls += 1
            self.begun.set()
            assert self.may.wait(60)
            return plain(*args)

        monkeypatch.setattr(EngineMaker, "_engine", waiting)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    made = Build(monkeypatch)
    yield made
    made.may.set()


@pytest.mark.parametrize("make", [tiny_sd, pytest.param(tiny_flux, marks=pytest.mark.slow)])
def test_pictures_are_plain_until_it_is_ready(make: Any, build: Build) -> None:
    pipe, call = make()
    want = torch.as_tensor(draw(pipe, call))
    with asyncdiff.parallelize(pipe, prepare="background", warmup=1, **SETTINGS) as handle:
        assert not handle.ready
        for _ in range(2):
            assert torch.equal(torch.as_tensor(draw(pipe, call)), want)
        assert build.begun.wait(60) and not handle.ready
        with pytest.raises(InputError, match="drawn plainly, while ranks are prepared"):
            handle.report()
        build.may.set()
        handle.wait()
        assert handle.ready and "drawn plainly" in repr(handle)
        near = torch.as_tensor(draw(pipe, call))
        assert not torch.equal(near, want)
        assert handle.report().warmup == 1 and build.calls == 1
    assert torch.equal(torch.as_tensor(draw(pipe, call)), want)


def test_random_numbers_are_those_of_the_plain_pipeline(build: Build) -> None:
    pipe, call = tiny_sd()
    call = {n: x for n, x in call.items() if n not in ("latents", "generator")}
    torch.manual_seed(0)
    want = torch.as_tensor(draw(pipe, call))
    build.may.set()  # while it prepares, if it is quick enough
    with asyncdiff.parallelize(pipe, prepare="background", warmup=99, **SETTINGS) as handle:
        torch.manual_seed(0)
        assert torch.equal(torch.as_tensor(draw(pipe, call)), want)
        handle.wait()


def shipped() -> Any:
    pipe: Any = demo_model.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"prompt": "red heart", "num_inference_steps": 4, "output_type": "pt"}


@pytest.mark.parametrize("make", [tiny_sd, pytest.param(shipped, marks=pytest.mark.slow)])
def test_pictures_while_it_really_prepares(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads, one that exports and one that draws, do not disturb each other."""
    uncached(monkeypatch)
    pipe, call = make()

    def drawn() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(draw(pipe, call | {"generator": generator}))

    want = drawn()
    with asyncdiff.parallelize(pipe, prepare="background", warmup=99, **SETTINGS) as handle:
        meanwhile = [drawn()]
        while not handle.ready:
            meanwhile.append(drawn())
        assert all(torch.equal(x, want) for x in meanwhile)
        torch.testing.assert_close(drawn(), want)
        assert handle.report().steps > 0


def test_nothing_is_drawn_while_times_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is timed in the middle of a picture."""
    pipe, call = tiny_sd()
    said: list[str] = []
    timing = threading.Event()
    measure = profiler.measure

    def slow(*args: Any) -> Any:
        said.append("timing")
        timing.set()
        found = measure(*args)
        said.append("timed")
        return found

    monkeypatch.setattr(profiler, "measure", slow)

    def told(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        said.append("drawn")
        return values

    call = call | {"callback_on_step_end": told}
    with asyncdiff.parallelize(pipe, ["cpu"] * 2, components=2, prepare="background") as handle:
        draw(pipe, call)
        steps = said.count("drawn")
        assert timing.wait(60)
        draw(pipe, call)
        handle.wait()
    at = said.index("timing")
    assert said[at + 1] == "timed" and at % steps == 0


def test_what_fails_is_told_and_comes_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*args: Any) -> Any:
        raise CaptureError("it cannot be exported")

    monkeypatch.setattr(cutter, "capture", failing)
    pipe, call = tiny_sd()
    want = torch.as_tensor(draw(pipe, call))
    with (
        caplog.at_level(logging.WARNING, "asyncdiff"),
        asyncdiff.parallelize(pipe, prepare="background", **SETTINGS) as handle,
    ):
        assert torch.equal(torch.as_tensor(draw(pipe, call)), want)
        handle.wait()
        assert "cannot be exported" in caplog.text
        with pytest.raises(CaptureError, match="cannot be exported"):
            draw(pipe, call)


def test_what_nobody_will_use_ends_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the end of the main thread makes of it, or it notices."""
    ending, failing = threading.Event(), threading.Event()

    def lasting(*args: Any) -> Any:
        ending.set()
        while not failing.is_set():
            progress.heartbeat("making ranks ready")
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(EngineMaker, "_engine", lasting)
    monkeypatch.setattr(background, "_ending", ending)
    for fails in (False, True):
        ending.clear()
        if fails:
            failing.set()
        pipe, call = tiny_sd()
        with (
            caplog.at_level(logging.WARNING, "asyncdiff"),
            asyncdiff.parallelize(pipe, prepare="background", **SETTINGS) as handle,
        ):
            draw(pipe, call)
            handle.wait()
        assert ending.is_set() and not caplog.records


ONE_PICTURE = """import time
import asyncdiff
from asyncdiff.progress import tell
from asyncdiff.runtime.making import EngineMaker
from tiny_pipelines import draw, tiny_sd

plain = EngineMaker._engine

def slow(*args):
    for k in range(600):
        tell("making ranks ready", k, 600)
        time.sleep(0.1)
    return plain(*args)

EngineMaker._engine = slow
pipe, call = tiny_sd()
asyncdiff.parallelize(
    pipe, ["cpu"] * 2, components=2, split="estimate", prepare="background"
)
draw(pipe, call)
print(time.monotonic())
"""


@pytest.mark.slow
def test_a_script_does_not_wait_for_what_it_will_not_use() -> None:
    script = subprocess.run(
        [sys.executable, "-c", ONE_PICTURE],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert time.monotonic() - float(script.stdout) < 10
    assert "asyncdiff" not in script.stderr and "shutdown" not in script.stderr


def test_restoring_waits_for_what_is_under_way(build: Build) -> None:
    pipe, call = tiny_sd()
    want = torch.as_tensor(draw(pipe, call))
    handle = asyncdiff.parallelize(pipe, prepare="background", **SETTINGS)
    draw(pipe, call)
    assert build.begun.wait(60)
    threading.Timer(0.2, build.may.set).start()
    handle.restore()
    assert handle.ready and torch.equal(torch.as_tensor(draw(pipe, call)), want)


def test_a_pipeline_that_offloads_is_prepared_by_its_first_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Hook:
        def offload(self) -> None:
            pass

    pipe, call = tiny_sd()
    with asyncdiff.parallelize(pipe, prepare="background", warmup=1, **SETTINGS) as handle:
        pipe._all_hooks = [Hook()]
        pipe.maybe_free_model_hooks = lambda: None
        draw(pipe, call)
        assert handle.ready and handle.report().warmup == 1
    assert "prepared by its first call" in caplog.text


def test_what_cannot_be_drawn_plainly_is_refused() -> None:
    pipe, _ = tiny_sd()
    for wrong, said in (
        ({"prepare": "later"}, "prepare='later'"),
        ({"prepare": "background", "checkpoint": "folder"}, "leave group and checkpoint out"),
    ):
        with pytest.raises(InputError, match=said):
            asyncdiff.parallelize(pipe, **SETTINGS, **wrong)
    weight = pipe.unet.conv_out.weight
    pipe.unet.conv_out._parameters["weight"] = torch.Tensor._make_subclass(Coded, weight.data)
    with pytest.raises(InputError, match=r"conv_out\.weight is quantised"):
        asyncdiff.parallelize(pipe, prepare="background", **SETTINGS)
    assert not hasattr(pipe, "_asyncdiff")
