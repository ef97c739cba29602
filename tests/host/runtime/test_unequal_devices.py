"""A denoiser on devices of unequal speed: CPUs stand for them, and what nodes cost is said."""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import group_unequal
import pytest
import reference
import torch
from group import run
from tiny_pipelines import draw as picture
from tiny_pipelines import tiny_flux, tiny_sd
from toys import Toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError
from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.signature import parse
from asyncdiff.partition.cost import Costs
from asyncdiff.partition.links import Links
from asyncdiff.partition.partition import Partition, partition
from asyncdiff.partition.shards import Shards
from asyncdiff.runtime import devices, making
from asyncdiff.runtime.cutting import cutter, profiler, rebalance
from asyncdiff.runtime.cutting.rebalance import recut
from asyncdiff.runtime.devices import Place
from asyncdiff.runtime.engine import Engine

FAST = Links.alike(1e12)


def deep(depth: int = 40) -> Any:
    torch.manual_seed(0)
    return Toy(depth=depth).double().eval().requires_grad_(False)


def even(captured: Captured, ms: float = 1.0) -> Costs:
    times = {n: 0.0 if n in captured.views else ms for n in captured.nodes}
    return Costs(times, dict.fromkeys(captured.nodes, 0), f"measured at {ms} ms")


def draw(denoiser: AsyncDenoiser) -> list[torch.Tensor]:
    times, out = [900, 500, 100], []
    with denoiser.generation(times):
        for t in times:
            out.append(denoiser(**toy_call() | {"timestep": torch.tensor(t)})[0].clone())
    return out


class Cards:
    """CPUs that count as cards of these kinds, by rank; the nodes of each take its milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kinds: dict[str, float]) -> None:
        self.measured: list[str] = []
        names = list(kinds)

        def places_of(config: Any, team: Any) -> list[Place]:
            found = devices.places_of(config, team)
            return [
                Place(p.process, p.device, f"{p.unit} {i}", p.host, names[i])
                for i, p in enumerate(found)
            ]

        def measured(profiler: Any, captured: Captured, call: Any, place: Place) -> Costs:
            self.measured.append(place.kind)
            return even(captured, kinds[place.kind])

        monkeypatch.setattr("asyncdiff.spread.places_of", places_of)
        monkeypatch.setattr(profiler.Profiler, "_measured", measured)
        monkeypatch.setattr(cutter.Cutter, "links", lambda cutter: FAST)


def test_cards_of_two_kinds_are_each_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Once, and for later processes not again; the components take as long as each other."""
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    cards = Cards(monkeypatch, {"A": 1.0, "B": 1 / 0.6})
    seen = []
    for _ in range(2):
        denoiser = AsyncDenoiser(deep(), devices=["cpu"] * 2, warmup=3)
        with contextlib.closing(denoiser):
            out = draw(denoiser)
            report, made = denoiser.report(), denoiser.partition.report()
        assert report.speeds == made.speeds == pytest.approx([1.0, 0.6], rel=1e-3)
        assert "devices at 100, 60 % of the fastest" in str(report)
        assert json.loads(json.dumps(report.to_dict()))["speeds"] == report.speeds
        whole = partition(denoiser_graph(), 1, costs=even(denoiser_graph())).report()
        assert max(c.ms for c in made.components) <= whole.components[0].ms / 1.6 / 0.95
        seen.append((made.cuts, out))
    assert cards.measured == ["A", "B"]
    assert seen[0][0] == seen[1][0]
    plain = deep()
    for t, got in zip([900, 500, 100], seen[0][1], strict=True):
        want = plain(**toy_call() | {"timestep": torch.tensor(t)})[0]
        assert torch.allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("speeds", [None, [1.0, 0.5]])
def test_tokens_are_shared_out_by_speed(
    monkeypatch: pytest.MonkeyPatch, speeds: list[float] | None
) -> None:
    """As nodes of cards of two kinds are measured, or as was said; for exact steps of components,
    too."""
    (plain, call), (pipe, _) = tiny_flux(), tiny_flux()
    want = picture(plain, call, num_inference_steps=3)
    monkeypatch.setattr("asyncdiff.partition.shards._PRODUCT_MS", 0.0)
    if speeds is None:
        Cards(monkeypatch, {"A": 1.0, "B": 2.0})
    with asyncdiff.parallelize(
        pipe, devices=["cpu"] * 2, schedule="sequence", speeds=speeds
    ) as handle:
        got = picture(pipe, call, num_inference_steps=3)
        parts = handle.partition
        assert isinstance(parts, Shards)
        longest = parts.sharding.longest()
        assert longest is not None
        mine, other = (longest.local(rank, parts.shares) for rank in range(2))
        assert mine == pytest.approx(2 * other, abs=2) and other > 0
        report = parts.report()
        assert report.speeds == [1.0, 0.5] and "1 at 50 %" in str(report)
        assert report.components[0].ms == pytest.approx(report.components[1].ms, rel=0.35)
    assert reference.distance(got, want) < 1e-5
    with asyncdiff.parallelize(
        pipe, devices=["cpu"] * 2, components=2, warmup=3, exact_mode="sequence", speeds=speeds
    ):
        assert reference.distance(picture(pipe, call, num_inference_steps=3), want) < 1e-5


_graph: list[Captured] = []


def denoiser_graph() -> Captured:
    if not _graph:
        module = deep()
        _graph.append(capture(module, parse(module, (), toy_call())))
    return _graph[0]


def test_equal_cards_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, seen = profiler.measure, []

    def measured(*args: Any) -> Costs:
        seen.append(args[2])
        return measure(*args)

    monkeypatch.setattr(profiler, "measure", measured)
    AsyncDenoiser(deep(3), (), toy_call(), devices=["cpu"] * 3, components=3).close()
    assert len(seen) == 1


def test_the_order_of_devices_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    Cards(monkeypatch, {"B": 2.0, "A": 1.0})
    denoiser = AsyncDenoiser(deep(), (), toy_call(), devices=["cpu"] * 2)
    with contextlib.closing(denoiser):
        first, second = denoiser.partition.components
        assert len(first.owned) < 0.6 * len(second.owned)
        assert denoiser.partition.speeds == [0.5, 1.0]


@pytest.mark.parametrize("split", ["auto", "estimate"])
def test_speeds_by_hand(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler.Profiler, "_measured", lambda s, captured, *_: even(captured))
    monkeypatch.setattr(cutter.Cutter, "links", lambda cutter: FAST)
    monkeypatch.setattr(cutter, "assumed_links", lambda places: FAST)
    given: dict[str, Any] = {"devices": ["cpu"] * 2, "split": split, "speeds": [5, 3, 9]}
    denoiser = AsyncDenoiser(deep(), (), toy_call(), **given)
    with contextlib.closing(denoiser):
        made = denoiser.partition.report()
    assert made.speeds == pytest.approx([1.0, 0.6], rel=1e-3)
    assert "at given speeds" in made.source
    a, b = (c.ms for c in made.components)
    assert abs(a - b) < 0.15 * a
    with pytest.raises(InputError, match="speeds has 1 entries, and these settings have 2 ranks"):
        AsyncDenoiser(deep(3), devices=["cpu"] * 2, speeds=[1])


@pytest.mark.slow
def test_processes_measure_their_own_cards(tmp_path: Path) -> None:
    """One of each kind, once, and all of them cut and speak alike."""
    found = run(group_unequal.unequal, 3, tmp_path)
    assert [measured for measured, *_ in found] == [1, 1, 0]
    (_, (cuts, speeds), (again, same)), *others = found
    assert speeds == same == [1.0, 0.5, 1.0] and cuts == again
    assert all(other == [[cuts, speeds]] * 2 for _, *other in others)


@pytest.mark.slow
def test_a_quality_takes_the_speeds_of_the_devices_that_it_uses() -> None:
    pipe, call = tiny_sd()
    given: dict[str, Any] = {"split": "estimate", "speeds": [1.0, 0.5]}
    with asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="fast", **given) as handle:
        picture(pipe, call, num_inference_steps=12)
        assert handle.config.components == 2
        assert handle.report().speeds == pytest.approx([1.0, 0.5], rel=1e-3)


# ---- one of equal cards that turns out to be slower ----------------------------------------------


def taken(parts: Partition, slow: list[float]) -> list[float]:
    """What components take on devices that take so many times as long."""
    captured = parts.captured
    return [
        s * sum(n not in captured.views and captured.each_run(n) for n in c.nodes)
        for c, s in zip(parts.components, slow, strict=True)
    ]


@pytest.mark.parametrize("slow", [[1.0, 1 / 0.6], [1 / 0.6, 1.0], [1.0, 1.0, 1.5]])
def test_a_slowed_card_is_found_out_at_once(slow: list[float]) -> None:
    """By the times of components, in one new cut: at least 0.95 of the ideal."""
    captured = denoiser_graph()
    parts = partition(captured, len(slow), costs=even(captured), links=FAST)
    new = recut(parts, taken(parts, slow), FAST)
    assert new is not None
    alone = partition(captured, 1, costs=even(captured)).report().components[0].ms
    assert max(taken(new, slow)) <= alone / sum(1 / s for s in slow) / 0.95
    assert new.speeds == pytest.approx([min(slow) / s for s in slow], rel=0.02)


def test_a_busy_card_is_looked_at_again_by_the_next_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which begins with the cut that was best, and notices that it is idle."""
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(profiler.Profiler, "_measured", lambda s, captured, *_: even(captured))
    slow = [1.0, 1 / 0.6]
    timed = []

    def component_ms(engine: Any, *_: Any) -> list[float]:
        timed.append(engine.partition.cuts)
        return taken(engine.partition, slow)

    monkeypatch.setattr(making, "component_ms", component_ms)
    cuts = []
    for each in ([1.0, 1 / 0.6], [1.0, 1 / 0.6], [1.0, 1.0], [1.0, 1.0]):
        slow[:] = each
        made = AsyncDenoiser(deep(), (), toy_call(), devices=["cpu"] * 2)
        cuts.append((made.partition.cuts, made.partition.speeds))
        made.close()
    (busy, speeds), again, (idle, equal), still = cuts
    assert speeds == pytest.approx([1.0, 0.6], rel=0.02) and again == (busy, speeds)
    assert equal == pytest.approx([1.0, 1.0], rel=0.02) and still == (idle, equal)
    assert timed[1] == timed[2] == timed[3] == busy != idle


def test_a_busy_card_is_found_out_by_runs_that_do_not_agree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One in six is not disturbed; and the next process begins with the cut for that card."""
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(profiler.Profiler, "_measured", lambda s, captured, *_: even(captured))
    monkeypatch.setattr(Engine, "graph_alone", lambda *_: None)
    slow = itertools.cycle([1.62, 1.0, 1.75, 1.69, 1.55, 1.72, 1.59, 1.0, 1.65, 1.58, 1.7, 1.67])
    runs: list[Any] = []

    def replay(engine: Engine, *_: Any) -> list[float]:
        runs.append(engine.partition.cuts)
        return taken(engine.partition, [1.0, next(slow)])

    def component_ms(engine: Engine, look: bool) -> list[float] | None:
        """As on GPUs."""
        places = [replace(p, unit=str(i)) for i, p in enumerate(engine.places)]
        with monkeypatch.context() as as_on_gpus:
            as_on_gpus.setattr(engine, "cuda", True)
            as_on_gpus.setattr(engine, "places", places)
            return rebalance.component_ms(engine, look)

    monkeypatch.setattr(rebalance, "replay", replay)
    monkeypatch.setattr(making, "component_ms", component_ms)
    for _ in range(2):
        with contextlib.closing(AsyncDenoiser(deep(), (), toy_call(), devices=["cpu"] * 2)) as made:
            assert made.partition.speeds == pytest.approx([1.0, 0.61], rel=0.02)
            busy = made.partition.cuts
    # Each time once to see how long it takes, and twelve runs.
    assert [cut == busy for cut in runs] == [False] * 13 + [True] * 26
