"""Preparing a pipeline ahead of its first picture."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import draw, tiny_flux, tiny_sd

import asyncdiff
from asyncdiff.demo import model as demo_model
from asyncdiff.errors import InputError
from asyncdiff.runtime import engine
from asyncdiff.runtime.cutting import cutter


@pytest.fixture
def shipped() -> Any:
    pipe: Any = demo_model.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Count:
    """How often a function was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        self.calls = 0
        plain = getattr(where, name)

        def counted(*args: Any, **options: Any) -> Any:
            self.calls += 1
            return plain(*args, **options)

        monkeypatch.setattr(where, name, counted)


def test_a_prepared_size_waits_for_nothing(shipped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    exports = Count(monkeypatch, cutter, "capture")
    with asyncdiff.parallelize(shipped, ["cpu"] * 2, components=2, split="estimate") as handle:
        state = torch.get_rng_state()
        (made,) = handle.prepare(height=32, width=64, batch=2, steps=4)
        assert torch.equal(torch.get_rng_state(), state)
        assert (made.height, made.width, made.batch, made.steps) == (32, 64, 2, 4)
        assert made.seconds == pytest.approx(sum(made.phases.values())) and made.seconds > 0
        assert {"export", "cut", "build"} <= made.phases.keys()
        assert str(made).startswith("64 x 32, 2 pictures: ")
        with pytest.raises(InputError, match="no generation has finished"):
            handle.report()
        shipped(["red heart"] * 2, height=32, width=64, num_inference_steps=4)
        report = handle.report()
        assert exports.calls == 1 and report.prepare_s < made.seconds
        assert report.prepare_phases["export"] == pytest.approx(made.phases["export"])
        (again,) = handle.prepare(height=32, width=64, batch=2, steps=4)
        assert exports.calls == 1 and "export" not in again.phases
        assert handle.report() is report


@pytest.mark.slow
def test_pictures_are_those_of_a_pipeline_that_was_not_prepared(shipped: Any) -> None:
    """Also where a quality chooses, and a rehearsal was given up in the middle of waves."""
    pictures = []
    for prepare in (False, True):
        with asyncdiff.parallelize(
            shipped, ["cpu"] * 2, quality="balanced", split="estimate"
        ) as handle:
            if prepare:
                (made,) = handle.prepare(steps=12, prompt="red heart")
                assert "balanced" in handle.settings or made.settings == handle.settings
                assert made.size == "the pipeline's own size"
            generator = torch.Generator().manual_seed(0)
            drawn = shipped(
                "red heart", num_inference_steps=12, generator=generator, output_type="pt"
            )
            pictures.append(drawn.images)
    assert torch.equal(*pictures)


@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_any_pipeline(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given what its pictures are drawn with; all branches of its guidance are ready then."""
    pipe, call = make()
    call = dict(call)
    made = Count(monkeypatch, engine.Engine, "__init__")
    with asyncdiff.parallelize(pipe, ["cpu"] * 2, components=2, split="estimate") as handle:
        steps = call.pop("num_inference_steps", 4)
        given = {n: x for n, x in call.items() if n not in ("generator", "output_type")}
        size = given.pop("height", None), given.pop("width", None)
        (found,) = handle.prepare(*size, steps=steps, **given)
        assert found.phases
        before = made.calls
        draw(pipe, call | {"num_inference_steps": steps})
        assert made.calls == before


def test_what_cannot_be_prepared_is_said(shipped: Any) -> None:
    with asyncdiff.parallelize(shipped, ["cpu"] * 2, components=2, split="estimate") as handle:
        for sizes, said in (
            ({"height": [32, 64], "width": [32]}, "2 of height, 1 of width"),
            ({"height": 0}, "height=0"),
            ({"batch": [1, 0.5]}, "batch=0.5"),
            ({"image": "none"}, "does not run with these arguments"),
        ):
            with pytest.raises(InputError, match=said):
                handle.prepare(**sizes)
        (made,) = handle.prepare(steps=2)  # and it works afterwards
        assert made.phases


@pytest.mark.slow
def test_the_next_process_finds_it_prepared(
    shipped: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    found = []
    for _ in range(2):
        with asyncdiff.parallelize(shipped, ["cpu"] * 2, components=2) as handle:
            found += handle.prepare(height=32, width=32, steps=2)
    assert "export" in found[0].phases and "export" not in found[1].phases
    assert "load" in found[1].phases


def test_progress_is_told(shipped: Any) -> None:
    heard: list[str] = []
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(
            asyncdiff.parallelize(
                shipped, ["cpu"] * 2, components=2, progress=lambda what, *_: heard.append(what)
            )
        )
        handle.prepare(height=32, width=32, steps=2)
    assert heard[0] == "exporting the denoiser" and "timing the denoiser's parts" in heard
