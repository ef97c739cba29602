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
    "schedule": str,
    "exact_tail": int,
    "extrapolate": float,
    "delay": int,
}
_RUN = re.compile(r"r(\d+) R(\d+) x(\d+) t(\d+)(?: e(\d+))?(?: p(\d+))?(?: <(\S+))?$")
_WAIT = re.compile(r"r(\d+) ([GL])(\d+):(\d+)$")


def to_text(plan: Plan) -> str:
    """One header line, then one line a tick: ``r1 G0:2; r1 R1 x3 t3 e3 <0:2; r1 L0:2``.

    ``r`` rank, ``G`` get, ``R`` run, ``L`` release, then the component, with the ordinal of the
    bundle that is taken or given back; of a run: ``x`` latents,
    ``t`` time index, ``e`` step delivered, ``p`` bundle sent, ``<`` bundles read.
    """
    edges = ",".join(f"{e.source}>{e.target}:{e.lag}" for e in plan.exchanges) or "-"
    head = (
        f"plan N={plan.components} S={plan.stride} w={plan.warmup} T={plan.steps} "
        f"time_shift={int(plan.time_shift)} slots={plan.slots} exchanges={edges}"
    )
    for name in _OPTIONS:  # written where they are not at their defaults
        value = getattr(plan, name)
        if value != Plan.__dataclass_fields__[name].default:
            head += f" {name}={int(value) if isinstance(value, bool) else value}"
    lines = [head]
    for tick in plan.ticks:
        serves = ",".join(map(str, tick.serves)) or "-"
        actions = "; ".join(map(_action_text, tick.actions))
        lines.append(f"{tick.index} {'exact' if tick.exact else 'async'} {serves} | {actions}")
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
    lines = text.strip().splitlines()
    try:
        head = dict(part.split("=", 1) for part in lines[0].split()[1:])
        edges = head["exchanges"]
        exchanges = tuple(
            Exchange(*map(int, re.split("[>:]", e))) for e in edges.split(",") if edges != "-"
        )
        ticks, slots = [], int(head["slots"])
        for number, line in enumerate(lines[1:], start=2):
            try:
                ticks.append(_tick_from_text(line, slots))
            except (ValueError, AttributeError) as error:
                raise PlanError(f"plan text, line {number}: cannot read {line!r}") from error
        return Plan(
            int(head["N"]), int(head["S"]), int(head["w"]), int(head["T"]),
            bool(int(head["time_shift"])), slots, exchanges, tuple(ticks),
            **{name: read(head[name]) for name, read in _OPTIONS.items() if name in head},
        )  # fmt: skip
    except (IndexError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, PlanError):
            raise
        raise PlanError("plan text, line 1: not the header of a plan") from error


def _tick_from_text(line: str, slots: int) -> Tick:
    head, _, body = line.partition(" |")
    index, kind, serves = head.split()
    if kind not in ("exact", "async"):
        raise ValueError(kind)
    actions = tuple(_action_from_text(part, slots) for part in body.strip().split("; ") if part)
    steps = () if serves == "-" else tuple(map(int, serves.split(",")))
    return Tick(int(index), kind == "exact", steps, actions)


def _action_from_text(text: str, slots: int) -> Action:
    wait = _WAIT.match(text)
    if wait:
        ordinal = int(wait[4])
        return Action(Kind(wait[2]), int(wait[1]), int(wait[3]), ordinal, ordinal % slots)
    run = _RUN.match(text)
    if run is None:
        raise ValueError(text)
    read = (map(int, part.split(":")) for part in (run[7] or "").split(",") if part)
    reads = tuple(Bundle(source, n, max(n, 0) % slots) for source, n in read)
    step = None if run[5] is None else int(run[5])
    put, slot = (NOTHING, NOTHING) if run[6] is None else (int(run[6]), int(run[6]) % slots)
    return Action(
        Kind.RUN, int(run[1]), int(run[2]), put, slot, int(run[3]), int(run[4]), step, reads
    )


def to_json(plan: Plan) -> str:
    """The plan as JSON: the header's fields, and the ticks in the notation of :func:`to_text`."""
    head, *ticks = to_text(plan).splitlines()
    data: dict[str, Any] = {"format": "asyncdiff-plan-2", "plan": head, "ticks": ticks}
    return json.dumps(data, indent=1)


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
    cells = [[""] * len(plan.ticks) for _ in range(plan.ranks)]
    for column, tick in enumerate(plan.ticks):
        for a in tick.runs:
            mark = f"t{a.time}" + ("*" if a.step is not None else "")
            cells[a.rank][column] = (cells[a.rank][column] + " " + mark).strip()
    heads = [("x" if t.exact else "") + (",".join(map(str, t.serves)) or "-") for t in plan.ticks]
    widths = [max(len(heads[c]), *(len(row[c]) for row in cells)) for c in range(len(heads))]
    names = [
        f"rank {r} C{plan.component_of(r)}" + (" copy" if r >= plan.components else "")
        for r in range(plan.ranks)
    ]
    left = max(map(len, [*names, "steps"]))
    rows = [["steps", *heads]] + [[n, *row] for n, row in zip(names, cells, strict=True)]
    blocks: list[list[int]] = [[]]
    for column, cell in enumerate(widths):
        used = left + 2 + sum(widths[c] + 1 for c in blocks[-1]) + 1 + cell
        if width is not None and used > width and blocks[-1]:
            blocks.append([])
        blocks[-1].append(column)
    return "\n\n".join(
        "\n".join(
            row[0].ljust(left) + " | " + " ".join(row[1 + c].rjust(widths[c]) for c in block)
            for row in rows
        )
        for block in blocks
    )
