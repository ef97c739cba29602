"""A split is cut again where its components turn out to be unequal."""

from __future__ import annotations

import contextlib
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rotation import often
from toys import Toy, toy, toy_call

import asyncdiff
from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.signature import parse
from asyncdiff.memory import uncollected
from asyncdiff.partition.cost import Costs
from asyncdiff.partition.links import Links
from asyncdiff.partition.partition import Component, Partition, partition
from asyncdiff.processes.team import Team
from asyncdiff.runtime import making as prepared
from asyncdiff.runtime.cutting import profiler, rebalance
from asyncdiff.runtime.cutting.rebalance import component_ms, next_cut, recut
from asyncdiff.runtime.devices import Place
from asyncdiff.runtime.engine import Engine

FAST = Links.alike(1e12)  # bytes a millisecond: what crosses takes no time


def deep() -> tuple[Captured, Costs]:
    """A denoiser of many equal layers, by what was measured of its nodes."""
    torch.manual_seed(0)
    module = Toy(depth=12).double().eval().requires_grad_(False)
    captured = capture(module, parse(module, (), toy_call()))
    return captured, even(captured)


def even(captured: Captured, *_: Any) -> Costs:
    """As if every node took a millisecond."""
    ms = {n: 0.0 if n in captured.views else 1.0 for n in captured.nodes}
    return Costs(ms, dict.fromkeys(captured.nodes, 0), "measured on a GPU")


def taken(parts: Partition, component: Component, slow: float) -> float:
    """What it takes, where the nodes that go up take ``slow`` times what was measured."""
    captured, ms = parts.captured, 0.0
    for node in component.nodes:
        if captured.each_run(node) and node not in captured.views:
            ms += slow if captured.module_path(node).startswith("up") else 1.0
    return ms


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("slow", [0.5, 1.4, 2.0])
def test_the_new_cut_is_more_even(count: int, slow: float) -> None:
    captured, costs = deep()
    parts = partition(captured, count, costs=costs, links=FAST)
    before = [taken(parts, c, slow) for c in parts.components]
    new = recut(parts, before, FAST)
    assert new is not None and new.cuts != parts.cuts
    after = [taken(new, c, slow) for c in new.components]
    assert max(after) < 0.98 * max(before)
    assert max(after) < 1.15 * sum(after) / count
    # What is reported of it is what it is expected to take.
    assert new.costs is not None and "corrected" in new.costs.source
    assert max(c.ms for c in new.report().components) < 0.985 * max(before)


def test_a_cut_that_is_even_stays() -> None:
    captured, costs = deep()
    parts = partition(captured, 2, costs=costs, links=FAST)
    times = [taken(parts, c, 1.0) for c in parts.components]
    assert recut(parts, times, FAST) is None
    # All slower by the same share: nothing to gain.
    assert recut(parts, [3 * t for t in times], FAST) is None
    unequal = [taken(parts, c, 1.3) for c in parts.components]
    assert recut(parts, unequal, FAST) is not None
    assert recut(parts, unequal, FAST, worth=0.5) is None
    # Microseconds are not worth it.
    assert recut(parts, [t / 1000 for t in unequal], FAST) is None


def test_where_no_cut_can_be_worth_it_none_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    captured, costs = deep()
    parts = partition(captured, 2, costs=costs, links=FAST)
    owned = sum(costs.ms[n] for c in parts.components for n in c.owned)
    looked: list[Any] = []

    def look(*given: Any, **options: Any) -> Partition:
        looked.append(given)
        return partition(*given, **options)

    monkeypatch.setattr(rebalance, "partition", look)
    # What both components compute could be saved, at best, by another cut.
    more = sum(taken(parts, c, 1.0) for c in parts.components) - owned
    assert 0 <= more < 0.01 * owned
    mean = (owned + more) / 2
    assert recut(parts, [mean * 1.005, mean * 0.995], FAST) is None and not looked
    recut(parts, [mean * 1.03, mean * 0.97], FAST)
    assert looked


def test_what_is_sent_too_late_counts() -> None:
    """The cut with fewer bytes over a slow link, though its components are less equal."""
    captured, costs = deep()
    wide = partition(captured, 2, costs=costs, links=FAST)
    slow = Links.alike(wide.boundaries[0, 1].nbytes / 100)  # 100 ms for all of it
    narrow = partition(captured, 2, costs=costs, links=slow)
    assert narrow.boundaries[0, 1].nbytes < wide.boundaries[0, 1].nbytes

    def times(parts: Partition) -> list[float]:
        return [taken(parts, c, 1.0) for c in parts.components]

    assert max(times(narrow)) > max(times(wide))
    new = recut(wide, times(wide), slow)
    assert new is not None and new.cuts == narrow.cuts
    both = [(narrow, times(narrow)), (wide, times(wide))]
    assert next_cut(both, slow) is narrow and next_cut(both[::-1], slow) is None
    assert next_cut(both[::-1], FAST) is wide


@pytest.mark.parametrize("guidance", often(["split"], ["batched", "split"]))
def test_a_denoiser_is_made_with_the_new_cut(
    monkeypatch: pytest.MonkeyPatch, guidance: str
) -> None:
    module, call = toy(), toy_call()
    made: list[Any] = []

    def timed(engine: Engine, *_: Any) -> list[float] | None:
        """As if the first component took far longer than it was cut for, and still does."""
        made.append(engine.partition)
        return [10.0 - len(made), 2.0]

    monkeypatch.setattr(profiler, "measure", even)
    monkeypatch.setattr(prepared, "component_ms", timed)
    ranks = 4 if guidance == "split" else 2
    timesteps = torch.tensor([900, 500, 100])
    denoiser = asyncdiff.AsyncDenoiser(
        module, (), call, devices=["cpu"] * ranks, components=2, warmup=3, guidance=guidance
    )
    assert len(made) == 3, "for one condition only"
    owned = [len(parts.components[0].owned) for parts in made]
    assert owned[0] > owned[1] > owned[2] == len(denoiser.partition.components[0].owned)
    want = [module(**{**call, "timestep": t})[0] for t in timesteps]
    with denoiser.generation(timesteps):
        for t, w in zip(timesteps, want, strict=True):
            assert torch.allclose(denoiser(**{**call, "timestep": t})[0], w, atol=1e-12)
    denoiser.close()


def test_what_components_took_counts_for_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each new size would be cut wrongly first, and ranks be made twice."""
    module = Toy(depth=12).double().eval().requires_grad_(False)
    made: list[Any] = []
    slow, short = [1.2], list[bool]()

    def timed(engine: Engine, look: bool) -> list[float]:
        parts = engine.partition
        made.append(parts.cuts)
        short.append(look)
        return [taken(parts, c, slow[0]) for c in parts.components]

    monkeypatch.setattr(profiler, "measure", even)
    monkeypatch.setattr(profiler.Profiler, "_timed_afterwards", True)
    monkeypatch.setattr(prepared, "component_ms", timed)
    denoiser = asyncdiff.AsyncDenoiser(module, devices=["cpu"] * 2, components=2)
    denoiser.prepare(**toy_call())
    assert len(made) > 1 and made[0] != made[-1]
    made.clear()
    assert not any(short)
    short.clear()
    denoiser.prepare(**toy_call(size=16))
    assert len(made) == 1
    # Where nothing has changed, a short look is enough; it is not enough to cut again by.
    assert short == [True]
    slow[0] = 0.8
    made.clear()
    short.clear()
    denoiser.prepare(**toy_call(size=24))
    assert short[0] and len(short) > 2 and not any(short[1:])
    assert made[0] == made[1] != made[-1]
    denoiser.close()


def test_a_short_look_takes_a_third_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    replays: list[list[int]] = []
    alike = True

    class Engine:
        cuda, team, workers = True, Team(), [SimpleNamespace(rank=0), SimpleNamespace(rank=1)]
        places = tuple(Place(0, torch.device("cpu"), unit) for unit in "ab")
        partition = SimpleNamespace(components=[0, 1])

        def graph_alone(self, worker: Any) -> None:
            pass

        def synchronize(self) -> None:
            pass

    def replayed(engine: Any, workers: Any, graphs: Any, counts: list[int]) -> list[float]:
        replays.append(counts)
        return [4.0, 6.0 if alike else 4.0 + len(replays)]

    for worker in Engine.workers:
        worker.current = contextlib.nullcontext
    monkeypatch.setattr(rebalance, "_fill", lambda worker: None)
    monkeypatch.setattr(rebalance, "replay", replayed)
    monkeypatch.setattr(rebalance, "_expected", lambda parts: ([4.1, 5.9], False))
    engine: Any = Engine()
    assert component_ms(engine) == [4.0, 6.0]
    assert replays == [[2, 2], *[[30, 20]] * 3]
    replays.clear()
    assert component_ms(engine, look=True) == [4.0, 6.0]
    assert replays == [[10, 7]] * 3
    alike = False
    replays.clear()
    assert component_ms(engine, look=True) is None and len(replays) == 6


def test_while_components_run_what_making_ranks_left_is_freed() -> None:
    class Left:
        def __init__(self) -> None:
            self.itself = self

    class Engine:
        def synchronize(self) -> None:
            seen.append(left())

    engine: Any = Engine()
    seen: list[Any] = []
    with uncollected():
        left = weakref.ref(Left())
        assert left() is not None
        rebalance.replay(engine, [], [], [])
    assert seen == [None]


def test_components_are_not_timed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float] | None] = []

    def timed(engine: Engine, *_: Any) -> list[float] | None:
        seen.append(component_ms(engine))
        return seen[-1]

    monkeypatch.setattr(prepared, "component_ms", timed)
    call = toy_call()
    for split, times in (("auto", [None]), ("estimate", []), ([["enter"], ["leave"]], [])):
        seen.clear()
        options: dict[str, Any] = {"components": 2, "split": split}
        if not isinstance(split, str):
            options["split"] = [["enter", "time", "text", "down"], ["mix", "up", "leave"]]
        asyncdiff.AsyncDenoiser(toy(), (), call, devices=["cpu"] * 2, **options).close()
        assert seen == times


def test_a_cut_that_turns_out_slower_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([[10.0, 2.0], [30.0, 30.0]])
    made: list[Any] = []

    def timed(engine: Engine, *_: Any) -> list[float]:
        made.append(engine.partition.cuts)
        return next(times)

    monkeypatch.setattr(profiler, "measure", even)
    monkeypatch.setattr(prepared, "component_ms", timed)
    denoiser = asyncdiff.AsyncDenoiser(toy(), (), toy_call(), devices=["cpu"] * 2, components=2)
    assert denoiser.partition.cuts == made[0] != made[1]
    denoiser.close()


def test_without_memory_for_the_new_cut_the_old_one_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Any] = []
    engines: list[weakref.ref[Engine]] = []

    class Full(Engine):
        def __init__(self, partition: Partition, *args: Any, **kwargs: Any) -> None:
            assert not any(engine() for engine in engines), "what is closed holds no memory"
            super().__init__(partition, *args, **kwargs)
            engines.append(weakref.ref(self))
            made.append(partition.cuts)
            if len(made) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(profiler, "measure", even)
    monkeypatch.setattr(prepared, "Engine", Full)
    monkeypatch.setattr(prepared, "component_ms", lambda *_: [10.0, 2.0])
    denoiser = asyncdiff.AsyncDenoiser(toy(), (), toy_call(), devices=["cpu"] * 2, components=2)
    assert made[2] == made[0] == denoiser.partition.cuts != made[1]
    assert "stays cut as it was" in caplog.text
    denoiser.close()


def test_the_first_condition_is_closed_when_the_second_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Engine] = []
    closed: list[Engine] = []

    class Full(Engine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if made:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(*args, **kwargs)
            made.append(self)

        def close(self) -> None:
            closed.append(self)
            super().close()

    monkeypatch.setattr(prepared, "Engine", Full)
    with pytest.raises(torch.OutOfMemoryError):
        asyncdiff.AsyncDenoiser(
            toy(), (), toy_call(), devices=["cpu"] * 4, components=2, guidance="split"
        )
    assert closed == made
