"""A plan as text, as JSON and as a printed grid. Text and JSON read back to an equal plan."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from ..errors import PlanError
from .actions import NOTHING, Action, Bundle, Exchange, Kind, Tick
from .plan import Plan

#: What a header may have besides, and how to read it.
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "schedule": str, "exact_tail": int, "extrapolate": float, "delay": int,
    "microbatches": int,
}  # fmt: skip
_RUN = re.compile(r"r(\d+) R(\d+) x(\d+) t(\d+)(?: e(\d+))?(?: p(\d+))?(?: <(\S+))?$")
_WAIT = re.compile(r"r(\d+) ([GL])(\d+):(\d+)$")


def to_text(plan: Plan) -> str:
    """One header line, then one line a tick: ``r1 G0:2; r1 R1 x3 t3 e3 <0:2; r1 L0:2``.

    ``r`` rank, ``G`` get, ``R`` run, ``L`` release, then the component, with the ordinal of the
    bundle that is taken or given back; of a run: ``x`` latents,
    ``t`` time index, ``e`` step delivered, ``p`` bundle sent, ``<`` bundles read. A tick says which
    micro-batch is its own (``m``), where there are several.
    """
    edges = ",".join(f"{e.source}>{e.target}:{e.lag}" for e in plan.exchanges) or "-"
    head = (
        f"plan N={plan.components} S={plan.stride} w={plan.warmup} T={plan.steps} "
        f"time_shift={int(plan.time_shift)} slots={plan.slots} exchanges={edges}"
    )
    for name in _OPTIONS:  # written where they are not at their defaults
        if (value := getattr(plan, name)) != getattr(Plan, name):
            head += f" {name}={value}"
    lines = [head]
    for tick in plan.ticks:
        serves = ",".join(map(str, tick.serves)) or "-"
        actions = "; ".join(map(_action_text, tick.actions))
        kind = "exact" if tick.exact else "async"
        part = f" m{tick.microbatch}" if plan.microbatches > 1 else ""
        lines.append(f"{tick.index} {kind} {serves}{part} | {actions}")
    return "\n".join(lines) + "\n"


def _action_text(a: Action) -> str:
    if a.kind is not Kind.RUN:
        return f"r{a.rank} {a.kind.value}{a.component}:{a.ordinal}"
    text = f"r{a.rank} R{a.component} x{a.latents} t{a.time}"
    if a.step is not None:
        text += f" e{a.step}"
    if a.ordinal != NOTHING:
        text += f" p{a.ordinal}"
    if a.reads:
        text += " <" + ",".join(f"{b.source}:{b.ordinal}" for b in a.reads)
    return text


def from_text(text: str) -> Plan:
    """Read what :func:`to_text` wrote. Raises PlanError naming the line that does not parse."""
    first, *lines = text.strip().splitlines() or [""]
    try:
        head = dict(part.split("=", 1) for part in first.split()[1:])
        edges = (re.split("[>:]", e) for e in head["exchanges"].split(",") if e != "-")
        exchanges = tuple(Exchange(*map(int, e)) for e in edges)
        n, stride, warmup, steps = (int(head[name]) for name in "NSwT")
        shift, slots = bool(int(head["time_shift"])), int(head["slots"])
        options = {name: read(head[name]) for name, read in _OPTIONS.items() if name in head}
    except (KeyError, ValueError, TypeError) as error:
        raise PlanError("plan text, line 1: not the header of a plan") from error
    ticks = tuple(_tick_from_text(i, line, slots) for i, line in enumerate(lines, start=2))
    return Plan(n, stride, warmup, steps, shift, slots, exchanges, ticks, **options)


def _tick_from_text(number: int, line: str, slots: int) -> Tick:
    head, _, body = line.partition(" |")
    try:
        index, kind, serves, *part = head.split()
        steps = () if serves == "-" else tuple(map(int, serves.split(",")))
        exact = {"exact": True, "async": False}[kind]
        actions = (_action_from_text(part, slots) for part in body.strip().split("; ") if part)
        microbatch = int(part[0].removeprefix("m")) if part else 0
        return Tick(int(index), exact, steps, tuple(actions), microbatch)
    except (KeyError, ValueError) as error:
        raise PlanError(f"plan text, line {number}: cannot read {line!r}") from error


def _action_from_text(text: str, slots: int) -> Action:
    if wait := _WAIT.match(text):
        ordinal = int(wait[4])
        return Action(Kind(wait[2]), int(wait[1]), int(wait[3]), ordinal, ordinal % slots)
    run = _RUN.match(text)
    if run is None:
        raise ValueError(text)
    rank, component, latents, time = map(int, run.group(1, 2, 3, 4))
    step = None if run[5] is None else int(run[5])
    put, slot = (NOTHING, NOTHING) if run[6] is None else (int(run[6]), int(run[6]) % slots)
    read = (map(int, part.split(":")) for part in (run[7] or "").split(",") if part)
    reads = tuple(Bundle(source, n, max(n, 0) % slots) for source, n in read)
    return Action(Kind.RUN, rank, component, put, slot, latents, time, step, reads)


def to_json(plan: Plan) -> str:
    """The plan as JSON: the header's fields, and the ticks in the notation of :func:`to_text`."""
    head, *ticks = to_text(plan).splitlines()
    return json.dumps({"format": "asyncdiff-plan-2", "plan": head, "ticks": ticks}, indent=1)


def from_json(text: str) -> Plan:
    """Read what :func:`to_json` wrote. Raises PlanError."""
    try:
        data = json.loads(text)
        if data["format"] != "asyncdiff-plan-2":
            raise PlanError(f"unknown plan format {data['format']!r}")
        return from_text("\n".join([data["plan"], *data["ticks"]]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise PlanError("not a plan in JSON") from error


def grid(plan: Plan, width: int | None = None) -> str:
    """Rows are ranks, columns ticks; a cell is the time index, with ``*`` where the run delivers.

    A column is headed by the sampler steps that follow the tick.

    Runs of an exact step follow each other (columns marked ``x``); those of a tick run at once.
    ``width``: characters of a line; what does not fit goes on below, in a further block.
    """
    names = [
        f"rank {r} C{plan.component_of(r)}" + (" copy" if r >= plan.components else "")
        for r in range(plan.ranks)
    ]
    left = max(map(len, [*names, "steps"]))
    rows = [name.ljust(left) + " |" for name in ["steps", *names]]
    blocks = [list(rows)]
    for tick in plan.ticks:
        column = [("x" if tick.exact else "") + (",".join(map(str, tick.serves)) or "-")]
        for rank in range(plan.ranks):
            runs = (a for a in tick.runs if a.rank == rank)
            column.append(" ".join(f"t{a.time}" + "*" * (a.step is not None) for a in runs))
        cell = max(map(len, column))
        used = len(blocks[-1][0]) + 1 + cell
        if width is not None and used > width and blocks[-1] != rows:
            blocks.append(list(rows))
        blocks[-1] = [
            row + " " + text.rjust(cell) for row, text in zip(blocks[-1], column, strict=True)
        ]
    return "\n\n".join(map("\n".join, blocks))
