"""What processes of a group on several hosts compute, and what they make of a failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from group import Member
from group_bits import ESTIMATE, THREE, generate
from group_failures import FOUR, SPLIT, loop, told
from toys import toy, toy_call

import asyncdiff_core as core
from asyncdiff import AsyncDenoiser
from asyncdiff.runtime.engine import Engine
from asyncdiff.runtime.worker import Worker

#: Every schedule, by how many ranks it has.
SETTINGS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"components": 2, "warmup": 2, **ESTIMATE},
        {"components": 2, **ESTIMATE, "schedule": "pipeline"},
        {"components": 2, "schedule": "wavefront", "warmup": 2, "exact_tail": 2, **ESTIMATE},
        {"components": 1, "guidance": "split"},
    ],
    3: [
        {"components": 3, "split": THREE, "warmup": "auto"},
        {"components": 2, **ESTIMATE, "stride": 2, "time_shift": True},
        {"components": 3, "split": THREE, "schedule": "wavefront", "stride": 2, "warmup": 2},
    ],
}


def settings_alone(processes: int) -> list[str]:
    """What :func:`settings` returns, by one process."""
    found = []
    for settings in SETTINGS[processes]:
        denoiser = AsyncDenoiser(toy(), devices=["cpu"] * processes, **settings)
        found.append(generate(denoiser))
        denoiser.close()
    return found


def settings(member: Member) -> list[str]:
    """Digests of toys, by settings; ``option``: who gets results."""
    group, found = member.group(), []
    for settings in SETTINGS[member.processes]:
        denoiser = AsyncDenoiser(toy(), group=group, deadline=20, results=member.option, **settings)
        found.append(generate(denoiser))
        denoiser.close()
    return found


def noted(work: Callable[..., Any], done: list[str]) -> Callable[..., Any]:
    """``work``, whose name is in ``done`` as often as it is called."""

    def working(*args: Any, **kwargs: Any) -> Any:
        done.append(work.__name__)
        return work(*args, **kwargs)

    return working


def order(member: Member) -> list[list[str]]:
    """What is issued and taken, in this order, in the last step: of engines that split guidance,
    and of those that take turns."""
    group, found, steps = member.group(), [], 4
    for settings in (s for s in SETTINGS[2] if {"guidance", "schedule"} & s.keys()):
        if settings.get("schedule") == "wavefront":
            continue
        done: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("issue", "results"):
                patch.setattr(Engine, name, noted(getattr(Engine, name), done))
            denoiser = AsyncDenoiser(toy(), group=group, deadline=20, **settings)
            generate(denoiser, steps=steps)
            denoiser.close()
        found.append(done[-(len(done) // steps) :])
    return found


def links(member: Member) -> dict[str, Any]:
    """Where ranks are, how they reach each other, and what the partition takes a link for."""
    from asyncdiff.runtime.cutting import cutter

    denoiser = AsyncDenoiser(toy(), group=member.group(), components=3, deadline=20)
    speeds = []
    measured = cutter.engine_links

    def between(places: Any, team: Any) -> Any:
        found = measured(places, team)
        assert found.pairs and all(places[a].host != places[b].host for a, b in found.pairs)
        speeds.append(found.bytes_per_ms)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutter, "engine_links", between)
        generate(denoiser)
    (kept,) = denoiser._engines._kept.values()
    (engine,) = kept.engines
    fabric = engine.fabric
    out = {
        "hosts": fabric.hosts,
        "links": sorted({kind for (a, b), kind in fabric.links().items() if a != b}),
        "units": sorted({p.unit for p in engine.places}),
        "speeds": speeds,
    }
    denoiser.close()
    return out


def killed(member: Member) -> Any:
    """The last process is killed in the middle of a generation; those that are left go on."""
    count = member.processes
    split = {3: THREE, 4: FOUR}[count]
    denoiser = AsyncDenoiser(
        toy(), group=member.group(), components=count, split=split, deadline=10
    )
    call = toy_call()
    loop(denoiser, call)

    def at(step: int) -> None:
        if step == 3 and member.process == count - 1:
            member.die()

    out = told(lambda: loop(denoiser, call, at=at))
    denoiser.close()
    left = list(range(count - 1))
    smaller = {2: SPLIT, 3: THREE}[count - 1]
    again = AsyncDenoiser(
        toy(), group=member.group("again", left), split=smaller, components=count - 1, deadline=10
    )
    out["again"] = loop(again, call)
    again.close()
    return out


def failed(member: Member) -> dict[str, Any]:
    """A rank of process 1 fails in a generation, on a fabric that goes on after it or (``option``)
    does not; then two that work."""
    with pytest.MonkeyPatch.context() as patch:
        if member.option == "over":
            patch.setattr(core.Fabric, "recovers", property(lambda fabric: False))
        denoiser = AsyncDenoiser(toy(), group=member.group(), split=SPLIT, deadline=10)
        call = toy_call()
        before = loop(denoiser, call)
        kept = denoiser._engines._kept
        first = [engine for one in kept.values() for engine in one.engines]
        issue = Worker.issue

        def fail(worker: Worker, *args: Any) -> Any:
            if member.process == 1:
                raise ValueError("this rank fails")
            return issue(worker, *args)

        def at(step: int) -> None:
            if step == 3:
                patch.setattr(Worker, "issue", fail)

        out = told(lambda: loop(denoiser, call, at=at))
        patch.setattr(Worker, "issue", issue)
        out["same"] = [loop(denoiser, call) == before for _ in range(2)]
        now = [engine for one in kept.values() for engine in one.engines]
        out["kept"] = [new is old for new, old in zip(now, first, strict=True)]
        denoiser.close()
        return out
