"""A denoiser that another process has prepared is not exported and measured again, and computes the
same bits."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import group_kept
import pytest
import torch
from export_cache import uncached
from group import run
from tiny_pipelines import draw, tiny_sd, tiny_unet
from toys import tower, tower_call, toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, turns
from asyncdiff.graph.capture import Captured, capture, tensors_of
from asyncdiff.graph.compiled.regions import repeated
from asyncdiff.graph.example_inputs import example_inputs
from asyncdiff.graph.signature import parse
from asyncdiff.partition.cost import Costs, estimate
from asyncdiff.partition.links import Link, Links
from asyncdiff.partition.partition import partition
from asyncdiff.preparation import captures, folder
from asyncdiff.preparation.captures import kept_capture
from asyncdiff.preparation.folder import preparations
from asyncdiff.preparation.graph_text import NotKeptError, of_data, to_data
from asyncdiff.runtime.cutting import cutter, profiler
from asyncdiff.runtime.exchange.compression import choice


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    return tmp_path / "preparations"


class Work:
    """How often something was exported and measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.exports = self.measured = 0
        export, measure = cutter.capture, profiler.measure

        def exported(*args: Any) -> Any:
            self.exports += 1
            return export(*args)

        def timed(*args: Any) -> Any:
            self.measured += 1
            return measure(*args)

        monkeypatch.setattr(cutter, "capture", exported)
        monkeypatch.setattr(profiler, "measure", timed)

    @property
    def done(self) -> tuple[int, int]:
        return self.exports, self.measured


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def generated(seed: int = 0, components: int = 2, **settings: Any) -> tuple[Any, torch.Tensor]:
    """The cuts and predictions of a denoiser that is made anew, as in another process."""
    denoiser = AsyncDenoiser(
        toy(seed), devices=["cpu"] * components, components=components, **settings
    )
    times = [900, 800, 700, 600]
    call = toy_call()
    out = []
    with contextlib.closing(denoiser), denoiser.generation(times):
        for time in times:
            out.append(denoiser(**call | {"timestep": torch.tensor(time)})[0].clone())
        return denoiser.partition.cuts, torch.stack(out)


def names(nodes: Any) -> list[str]:
    return [n.name for n in nodes]


def same(a: Captured, b: Captured) -> None:
    assert [n.format_node() for n in a.graph.nodes] == [n.format_node() for n in b.graph.nodes]
    for field in ("variant", "timed", "once", "views"):
        assert set(names(getattr(a, field))) == set(names(getattr(b, field)))
    assert (a.names, a.places, a.inputs, a.out_spec) == (b.names, b.places, b.inputs, b.out_spec)
    assert [a.module_path(n) for n in a.nodes] == [b.module_path(n) for n in b.nodes]
    assert list(a.weights) == list(b.weights)
    assert all(a.weights[n] is b.weights[n] for n in a.places)
    assert list(map(shapes, a.graph.nodes)) == list(map(shapes, b.graph.nodes))


def shapes(node: Any) -> list[Any]:
    return [(t.shape, t.stride(), t.dtype) for t in tensors_of(node)]


@pytest.mark.parametrize("make", [toy, tiny_unet])
def test_a_graph_is_made_of_data_again(make: Any) -> None:
    module = make()
    call = parse(module, (), toy_call() if make is toy else example_inputs(module))
    fresh = capture(module, call)
    same(of_data(to_data(fresh), module, call), fresh)


def test_its_regions_are_the_same() -> None:
    module = tower()
    call = parse(module, (), tower_call())
    fresh = capture(module, call)
    assert repeated(of_data(to_data(fresh), module, call)) == repeated(fresh) != {}


def test_a_denoiser_that_fails_when_it_is_looked_at_is_prepared(
    work: Work, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its attributes raise, or what is written of its graph."""
    for name in ("of_graph", "to_data"):
        with monkeypatch.context() as patch:
            patch.setattr(captures, name, lambda *args: 1 / 0)
            generated(split="estimate")
    assert work.exports == 2 and not preparations().entries()


class Odd(torch.nn.Module):
    """Constants of its own, numbers without an end, parts of a tensor."""

    def __init__(self, turn: float = 3.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.turns = torch.tensor([1 + 2j, turn, 1j])  # as Qwen-Image has it: no buffer

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> dict[str, torch.Tensor]:
        own = torch.tensor([1.0, 2.5, -0.0]) * self.turns.real.float()
        a, b = sample.masked_fill(sample > 9, float("-inf")).split([1, 2], dim=0)
        mixed = torch.cat([b, a * own + self.weight]) * timestep.to(torch.float32)
        return {"sample": mixed.to(torch.float64).nan_to_num(), "first": mixed[::2, 1:]}


def test_odd_arguments_and_constants(work: Work, kept: Path) -> None:
    call = {"sample": torch.arange(9.0).reshape(3, 3), "timestep": torch.tensor(2)}
    expected, found = Odd()(**call), []
    for _ in range(2):
        denoiser = AsyncDenoiser(Odd(), devices=["cpu"], components=1)
        with contextlib.closing(denoiser), denoiser.generation([2]):
            found.append(denoiser(**call))
    assert work.exports == 1
    for each in found:
        for name, value in expected.items():
            torch.testing.assert_close(each[name], value, rtol=0, atol=0)
    other = AsyncDenoiser(Odd(4.0), devices=["cpu"], components=1)
    with contextlib.closing(other), other.generation([2]):
        torch.testing.assert_close(other(**call)["first"], Odd(4.0)(**call)["first"])
    assert work.exports == 2


def test_the_second_process_does_nothing_again(work: Work, kept: Path) -> None:
    """And has the first one's cuts and bits, with weights of its own."""
    fresh = generated()
    assert work.done == (1, 1)
    again = generated()
    assert work.done == (1, 1)
    assert again[0] == fresh[0] and torch.equal(again[1], fresh[1])
    other = generated(seed=3)
    assert work.done == (1, 1) and not torch.equal(other[1], fresh[1])
    generated(components=3)  # the same costs, cut elsewhere
    assert work.exports == 1
    assert {e.kind for e in preparations().entries()} == {"graph", "cuts"}


def test_a_cut_for_other_links_is_not_taken(
    work: Work, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured, up to what measuring errs by. What nodes cost holds for all links."""
    links = Links.alike(1e5)
    monkeypatch.setattr(cutter, "engine_links", lambda places, team: links)
    made = []

    def parted(*args: Any, **given: Any) -> Any:
        made.append(given["links"])
        return partition(*args, **given)

    monkeypatch.setattr(choice, "partition", parted)
    for speed, cuts in ((2e7, 1), (2.5e7, 1), (6e6, 2), (2e7, 3), (2e7, 3)):
        links = Links(Link(1e9), {(0, 1): Link(speed, 0.01)})
        generated()
        assert work.done == (1, 1) and len(made) == cuts


def test_an_estimated_cut_goes_by_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is the same in every run, however busy a machine is."""

    def measured(*_: Any) -> Any:
        raise AssertionError("links were measured")

    monkeypatch.setattr(cutter, "engine_links", measured)
    generated(split="estimate")


def test_without_a_folder_all_is_done_again(
    work: Work, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = generated(split="estimate")
    assert generated(split="estimate")[0] == fresh[0] and work.exports == 1
    monkeypatch.setenv("ASYNCDIFF_CACHE", "off")
    assert torch.equal(generated(split="estimate")[1], fresh[1]) and work.exports == 2
    monkeypatch.setenv("ASYNCDIFF_CACHE", "/proc/nowhere")
    assert torch.equal(generated(split="estimate")[1], fresh[1]) and work.exports == 3


def test_entries_that_are_not_what_they_say_are_made_anew(
    work: Work, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole files, by their checksums, with something else in them."""
    generated()
    wrong: list[Any] = [{}, [], {"nodes": [["call_method", "x", "y", [], [], None, None]]}]
    for i, content in enumerate(wrong, start=1):
        for entry in preparations().entries():
            preparations().write(entry.kind, entry.key, "", content)
        folder._folders.clear()
        caplog.clear()
        generated()
        assert work.done == (1 + i, 1 + i)
        assert len(caplog.records) == 2
    generated()
    assert work.done == (1 + len(wrong), 1 + len(wrong))


def test_a_cut_that_was_settled_is_not_timed_again(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is cut again is kept with the costs that were corrected."""
    timed = []

    def component_ms(engine: Any, *_: Any) -> list[float]:
        """A little more than its nodes say, at first."""
        timed.append(engine.partition.cuts)
        first, second = (c.ms for c in engine.partition.report().components)
        return [1.09 * first if len(timed) == 1 else first, second]

    def measured(captured: Captured, *_: Any) -> Costs:
        """Long enough to be timed, and the same each time."""
        costs = estimate(captured)
        return replace(costs, ms={n: 1e4 * t for n, t in costs.ms.items()}, source="measured")

    monkeypatch.setattr("asyncdiff.runtime.making.component_ms", component_ms)
    monkeypatch.setattr(profiler, "measure", measured)
    cuts = generated()[0]
    made = len(timed)
    assert timed[-1] == cuts != timed[0]
    assert generated()[0] == cuts and len(timed) == made


def test_pipelines_are_prepared_by_what_is_kept(work: Work, kept: Path) -> None:
    pictures = []
    for _ in range(2):
        pipe, call = tiny_sd()
        with asyncdiff.parallelize(pipe, ["cpu"] * 2, components=2, warmup=2):
            pictures.append(draw(pipe, call))
    assert work.done == (1, 1)
    assert (pictures[0] == pictures[1]).all()


def test_what_numbers_a_graph_is_right_for_is_kept(kept: Path) -> None:
    module = toy()
    call = parse(module, (), toy_call())
    fresh = capture(module, call)
    fresh.guards.comparisons["scale"] = {("ne", 0.0): None}
    fresh.guards.frozen.add("other")
    read = of_data(to_data(fresh), module, call)
    assert read.guards.comparisons == fresh.guards.comparisons
    assert read.guards.frozen == {"other"}


@pytest.mark.slow
def test_the_shipped_model_is_prepared_in_a_third_of_the_time(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what is kept, in as new a process as tests are."""
    from asyncdiff.demo import model as demo_model
    from asyncdiff.phases import recording

    uncached(monkeypatch)
    took = []
    for _ in range(2):
        unet: Any = demo_model.load().unet
        denoiser = AsyncDenoiser(unet, devices=["cpu"] * 2)
        with contextlib.closing(denoiser), recording() as spent:
            denoiser.prepare(**example_inputs(unet))
        took.append(spent)
    cold, warm = took
    assert warm.total <= cold.total / 3, (cold, warm)
    assert {"export", "measure", "cut"} <= cold.phases.keys()
    assert not {"export", "measure", "cut"} & warm.phases.keys()


def test_what_has_no_words_is_not_kept(kept: Path) -> None:
    module = toy()
    call = parse(module, (), toy_call())
    fresh = capture(module, call)
    with pytest.raises(NotKeptError):
        fresh.nodes[3].kwargs = {"what": object()}  # type: ignore[dict-item]
        to_data(fresh)
    assert kept_capture(module, call, lambda: fresh) is fresh
    assert not preparations().entries()


# ---- several processes ---------------------------------------------------------------------------


def _prepare(path: str, ready: Any, started: Any, results: Any) -> None:
    import os

    os.environ["ASYNCDIFF_CACHE"] = path
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        uncached(patch)
        work = Work(patch)
        started.put(1)
        ready.wait(60)
        cuts, out = generated()
        results.put((work.done, cuts, out.numpy().tobytes()))


def test_two_processes_at_once_share_one_preparation(kept: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, started, results = context.Event(), context.Queue(), context.Queue()
    both = [
        context.Process(target=_prepare, args=(str(kept.parent), ready, started, results))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    for _ in both:
        started.get(timeout=60)
    ready.set()
    found = [results.get(timeout=100) for _ in both]
    for process in both:
        process.join(60)
    assert sorted(done for done, _, _ in found) == [(0, 0), (1, 1)]
    assert found[0][1:] == found[1][1:]


@pytest.mark.slow
def test_a_group_reads_what_a_group_has_kept(tmp_path: Path) -> None:
    """The graph in each process, which one of them has exported, the cuts in the first one."""
    found = run(group_kept.prepared, 2, tmp_path, ["cold", "warm"])
    (done, *first), *others = found
    assert sorted([done, others[0][0]]) in ([[0, 0], [1, 1]], [[0, 1], [1, 0]])
    assert [other[0] for other in others[1:]] == [[0, 0], [0, 0]]
    assert all(other[1:] == first for other in others)


def test_who_waits_too_long_prepares_by_itself(
    work: Work, kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    generated(split="estimate")
    (entry,) = preparations().entries()
    with turns.alone(preparations().turn(entry.kind, entry.key)):
        preparations().file(entry.kind, entry.key).unlink()
        with caplog.at_level(logging.WARNING, "asyncdiff"):
            generated(split="estimate")
    assert work.exports == 2
    assert "does not wait" in caplog.records[0].getMessage()


@pytest.fixture(autouse=True)
def lines_are_said_again() -> Iterator[None]:
    yield
    folder._folders.clear()
