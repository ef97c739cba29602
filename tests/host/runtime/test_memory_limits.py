"""Components within limits of memory: by hand, and by what is free."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import draw, tiny_sd
from toys import attention, attention_call, tower, tower_call

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError, MemoryLimitError, ParallelConfig
from asyncdiff.generation.report import on_each_device
from asyncdiff.partition.links import Links
from asyncdiff.runtime.cutting import cutter, profiler
from asyncdiff.runtime.cutting.cutter import Cutter
from asyncdiff.runtime.cutting.memory_limits import MemoryLimits

TIMES = [900, 500, 100]


@pytest.fixture(autouse=True)
def links_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else so small a denoiser has its cut where least crosses."""
    monkeypatch.setattr(Cutter, "links", lambda cutter: Links.alike(1e12))
    monkeypatch.setattr(cutter, "assumed_links", lambda places: Links.alike(1e12))


def made(**settings: Any) -> AsyncDenoiser:
    given: dict[str, Any] = {"devices": ["cpu"] * 2, "split": "estimate"} | settings
    return AsyncDenoiser(tower(widths=[32] * 8), (), tower_call(), **given)


def needs(**settings: Any) -> list[int]:
    with contextlib.closing(made(**settings)) as denoiser:
        return [use.total for use in denoiser.partition.memory()]


@pytest.mark.parametrize("split", ["auto", "estimate"])
def test_component_0_at_most(split: str) -> None:
    free = needs(split=split)
    limit = int(free[0] * 0.7)
    with contextlib.closing(made(split=split, memory=[limit, None])) as denoiser:
        uses = denoiser.partition.memory()
        assert uses[0].total <= limit < free[0] and uses[1].total > free[1]
        with denoiser.generation(TIMES):
            got = [denoiser(**tower_call() | {"timestep": torch.tensor(t)}).clone() for t in TIMES]
        report = denoiser.report()
        (cpu,) = report.memory
        assert cpu["device"] == "cpu" and cpu["peak_bytes"] is None
        assert cpu["estimated_bytes"] == sum(use.total for use in uses)
        assert report.settings["memory"] == (limit, None)
        partition = denoiser.partition.report()
        assert partition.to_dict()["memory"][0]["total"] == uses[0].total
        assert f"memory of component 0, estimated: {uses[0]}" in str(partition)
    assert torch.isfinite(got[-1]).all()


def test_what_does_not_fit_is_refused_with_what_it_needs() -> None:
    limit = min(needs()) // 3
    with pytest.raises(MemoryLimitError, match=r"that they may take \(memory\): under the closest"):
        made(memory=limit)
    paths = [["enter", "blocks.0"], [*(f"blocks.{i}" for i in range(1, 8)), "leave"]]
    with pytest.raises(MemoryLimitError, match="cut as given they need component 0 "):
        made(split=paths, memory=limit)
    made(split=paths, memory="1GB").close()
    with pytest.raises(MemoryLimitError, match="1 components do not fit"):
        made(devices=["cpu"], components=1, memory=limit)


def test_a_device_that_does_not_run_the_whole_does_not_limit_it() -> None:
    """Of three, two run exact steps, a condition each."""
    whole = needs(components=1, devices=["cpu"])[0]
    given: dict[str, Any] = {"components": 3, "devices": ["cpu"] * 3, "exact_mode": "split"}
    for memory, fits in (([2 * whole, 2 * whole, whole // 2], True), ([whole // 2] * 3, False)):
        denoiser = made(**given, warmup=3, memory=memory)
        with contextlib.closing(denoiser), contextlib.ExitStack() as stack:
            if not fits:
                stack.enter_context(pytest.raises(MemoryLimitError, match="1 components do not"))
            with denoiser.generation(TIMES):
                denoiser(**tower_call() | {"timestep": torch.tensor(900)})


def test_other_limits_are_other_cuts_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    limit = int(needs(split="auto")[0] * 0.7)
    for _ in range(2):
        assert needs(split="auto", memory=[limit, None])[0] <= limit
        assert needs(split="auto")[0] > limit


class Free:
    """CPUs on which so many bytes are free, as on GPUs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *rooms: int) -> None:
        self.rooms = list(rooms)
        monkeypatch.setattr(MemoryLimits, "_room", lambda limits: self.rooms)


def test_what_is_free_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    free = needs()
    Free(monkeypatch, int(free[0] * 0.7), 10**9)
    assert needs()[0] <= free[0] * 0.7
    # What was said goes before.
    assert needs(memory="1GB") == free


def test_tokens_are_shared_out_where_weights_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"schedule": "sequence", "components": 2, "devices": ["cpu"] * 2}
    call = attention_call()
    with contextlib.closing(AsyncDenoiser(attention(), (), call, **settings)) as denoiser:
        uses = [use.total for use in denoiser.partition.memory()]
    for less in (0, 1):
        Free(monkeypatch, uses[0], uses[1] - less)
        with contextlib.ExitStack() as stack:
            if less:
                free = pytest.raises(MemoryLimitError, match="free on their devices: cut as given")
                stack.enter_context(free)
            AsyncDenoiser(attention(), (), call, **settings).close()
    four = {**settings, "guidance": "split", "devices": ["cpu"] * 4}
    with pytest.raises(MemoryLimitError, match="cut as given"):  # also of the other condition
        AsyncDenoiser(attention(), (), attention_call(2), **four, memory=[10**9] * 3 + [1000])


def test_an_estimate_of_what_runs_need_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where weights and mailboxes fit into what is free, it is tried, with a warning."""
    with contextlib.closing(made()) as denoiser:
        uses = denoiser.partition.memory()
    room = [int(u.total - 0.6 * u.activations) for u in uses]
    Free(monkeypatch, *room)
    with caplog.at_level(logging.WARNING, "asyncdiff"):
        assert needs()
    assert "memory may not suffice: the denoiser's 2 components" in caplog.text
    Free(monkeypatch, 1000, 1000)
    with pytest.raises(MemoryLimitError, match="the memory free on their devices"):
        made()


def test_a_kept_cut_that_does_not_fit_any_more_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    free = needs(split="auto")
    monkeypatch.setattr(profiler, "measure", None)
    Free(monkeypatch, int(free[0] * 0.7), 10**9)
    assert needs(split="auto")[0] <= free[0] * 0.7


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("10GB", 10**10),
        ("9.5 GiB", int(9.5 * 2**30)),
        (5_000_000, 5_000_000),
        (["10GB", None, "1mb"], (10**10, None, 10**6)),
        (["8G"], (8 * 10**9,)),
    ],
)
def test_sizes(given: Any, kept: Any) -> None:
    assert ParallelConfig(memory=given).memory == kept


@pytest.mark.parametrize("given", ["ten", "10XB", -5, 0, ["10GB", "-1GB"], [None, True], {}, "."])
def test_what_are_no_sizes(given: Any) -> None:
    if given == {}:
        given = object()
    with pytest.raises(InputError, match="write what components may take, in bytes or as '10GB'"):
        ParallelConfig(memory=given)


def test_too_few_entries() -> None:
    with pytest.raises(InputError, match="memory has 1 entries, and these settings have 2 ranks"):
        made(memory=["1GB"])


def test_devices_of_several_engines() -> None:
    """Branches share weights; the denoisers of a pipeline do not."""

    def entry(weights: int, all_of_it: int, peak: int | None = None) -> dict[str, Any]:
        return {
            "device": "cuda:0",
            "weights_bytes": weights,
            "estimated_bytes": all_of_it,
            "peak_bytes": peak,
        }

    both = [[entry(100, 130, 7)], [entry(100, 140, 9)]]
    assert on_each_device(both, shared=True) == [entry(100, 170, 9)]
    assert on_each_device(both, shared=False) == [entry(200, 270, 9)]
    assert on_each_device([[entry(40, 50)], [entry(100, 120)]], shared=True) == [entry(100, 130)]


@pytest.mark.slow
def test_a_quality_keeps_to_the_limits() -> None:
    """Where no device may hold all of the denoiser, none does."""
    pipe, call = tiny_sd()
    size = sum(w.nbytes for w in pipe.unet.parameters())
    limits = int(size * 0.9)
    with asyncdiff.parallelize(
        pipe, ["cpu"] * 2, quality="balanced", split="estimate", memory=limits
    ) as handle:
        draw(pipe, call, num_inference_steps=12, guidance_scale=5.0)
        assert handle.config.components == 2 and handle.config.exact_mode == "chain"
        assert all(use.total <= limits for use in handle.partition.memory())
        draw(pipe, call, num_inference_steps=4, guidance_scale=5.0)
        assert handle.config.components == 2
