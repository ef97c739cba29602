"""What a generation did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class GenerationReport:
    """What a generation did.

    Milliseconds are wall time from the first step's call to the end of the last step's
    computation, without preparation. ``prepare_s`` are seconds that it was prepared in, with what
    was compiled then; ``prepare_phases`` those that preparing took for such inputs, whenever that
    was, by phase: what was kept on the disk was loaded ("load"), the denoiser exported ("export"),
    its nodes timed ("measure"), it was cut ("cut"), ranks were made ready ("build"), compiled
    ("compile"), timed ("balance"), and CUDA graphs recorded ("capture"). ``compile_s``: those that
    compiling took for such inputs, whenever that was.
    ``exchange_bytes`` is all that ranks sent to others,
    ``exchange_bytes_per_tick`` the boundary's share of it in an asynchronous tick, ``exposed_ms``
    the part of the exchange that computation did not hide (None if not measured). ``settings`` are
    those of :class:`asyncdiff.ParallelConfig`. ``branches`` are the denoiser's calls in a step:
    ticks and bytes are those of all of them. ``speeds``: how fast each component's device is, 1 the
    fastest, as the cut takes them to be. ``memory``: of each device its ``device``, the
    ``weights_bytes`` of its components, the ``estimated_bytes`` of all that they need
    (docs/guide/memory.md), and the ``peak_bytes`` that torch has had there in this process, with
    all else in it, also while it prepared (None on CPUs and in other processes).
    ``simulated_link``: the link that ranks were made to have (``ASYNCDIFF_LINK``), None where links
    were as they are.
    """

    components: int
    stride: int
    warmup: int
    devices: list[str]
    steps: int
    ticks: int
    total_ms: float
    prepare_s: float
    prepare_phases: dict[str, float]
    exchange_bytes: int
    exchange_bytes_per_tick: int
    exposed_ms: float | None
    exposed_ms_per_tick: float | None
    cuda_graphs: bool
    compiled: bool
    compile_s: float
    settings: dict[str, Any]
    branches: int = 1
    speeds: list[float] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    simulated_link: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        exposed = "not measured" if self.exposed_ms is None else f"{self.exposed_ms:.2f} ms"
        steps = f"{self.steps} steps"
        if self.branches > 1:
            steps += f" of {self.branches} calls"
        return (
            f"{steps} in {self.ticks} ticks on {len(self.devices)} ranks "
            f"({', '.join(self.devices)}): {self.total_ms:.1f} ms, "
            f"{self.total_ms / self.steps:.2f} ms a step; "
            f"exchanged {self.exchange_bytes / 2**20:.1f} MiB "
            f"({self.exchange_bytes_per_tick / 2**20:.2f} MiB a tick), exposed {exposed}; "
            f"prepared in {self.prepare_s:.1f} s{by_phase(self.prepare_phases, ' in all')}"
            + in_percent(self.speeds)
            + _at_most(self.memory)
            + (f"; links simulated: {self.simulated_link}" if self.simulated_link else "")
        )


def by_phase(phases: Mapping[str, float], what: str = "") -> str:
    """Seconds by phase, in words, of those that took a tenth of a second; nothing where none
    did."""
    told = [f"{name} {seconds:.1f}" for name, seconds in phases.items() if seconds >= 0.05]
    return f" ({', '.join(told)} s{what})" if told else ""


def in_percent(speeds: Sequence[float]) -> str:
    """Speeds of components' devices in words, where they differ."""
    if len(set(speeds)) < 2:
        return ""
    return f"; devices at {', '.join(f'{100 * s:.0f}' for s in speeds)} % of the fastest"


def _at_most(memory: Sequence[Mapping[str, Any]]) -> str:
    """Peaks of memory in words, where they are known."""
    told = [f"{m['peak_bytes'] / 1e9:.2f} GB of {m['device']}" for m in memory if m["peak_bytes"]]
    return f"; at most {', '.join(told)}" if told else ""


def on_each_device(
    lists: Sequence[Sequence[Mapping[str, Any]]], shared: bool
) -> list[dict[str, Any]]:
    """What several need of each device, whose weights are ``shared`` or not."""
    out: dict[str, dict[str, Any]] = {}
    for entry in (entry for entries in lists for entry in entries):
        known = out.get(entry["device"])
        if known is None:
            out[entry["device"]] = dict(entry)
            continue
        weights = known["weights_bytes"], entry["weights_bytes"]
        known["weights_bytes"] = max(weights) if shared else sum(weights)
        known["estimated_bytes"] += entry["estimated_bytes"] - sum(weights) + known["weights_bytes"]
        peaks = [p for p in (known["peak_bytes"], entry["peak_bytes"]) if p is not None]
        known["peak_bytes"] = max(peaks, default=None)
    return list(out.values())


def sum_of_phases(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds by phase of all of them."""
    names = dict.fromkeys(name for phases in each for name in phases)
    return {name: sum(phases.get(name, 0.0) for phases in each) for name in names}


def in_turn(reports: Sequence[GenerationReport]) -> GenerationReport | None:
    """What the denoisers of a pipeline did, one after another; None of none."""
    if len(reports) < 2:
        return reports[0] if reports else None
    known = [r.exposed_ms for r in reports if r.exposed_ms is not None]
    return replace(
        max(reports, key=lambda r: r.steps),
        steps=sum(r.steps for r in reports),
        ticks=sum(r.ticks for r in reports),
        total_ms=sum(r.total_ms for r in reports),
        prepare_s=sum(r.prepare_s for r in reports),
        prepare_phases=sum_of_phases([r.prepare_phases for r in reports]),
        exchange_bytes=sum(r.exchange_bytes for r in reports),
        exposed_ms=sum(known) if known else None,
        compile_s=sum(r.compile_s for r in reports),
        memory=on_each_device([r.memory for r in reports], shared=False),
    )


def of_branches(reports: list[GenerationReport]) -> GenerationReport:
    """What the branches of a generation did."""
    first, *others = reports
    if not others:
        return first
    split = first.settings["guidance"] == "split"  # the second branch has ranks of its own
    exposed = [r.exposed_ms for r in reports if r.exposed_ms is not None]
    each = [r.exposed_ms_per_tick for r in reports if r.exposed_ms_per_tick is not None]
    return replace(
        first,
        branches=len(reports),
        devices=first.devices + (others[0].devices if split else []),
        ticks=sum(r.ticks for r in reports),
        total_ms=max(r.total_ms for r in reports),
        prepare_s=sum(r.prepare_s for r in reports),
        prepare_phases=sum_of_phases([r.prepare_phases for r in reports]),
        exchange_bytes=sum(r.exchange_bytes for r in reports),
        exchange_bytes_per_tick=max(r.exchange_bytes_per_tick for r in reports),
        exposed_ms=sum(exposed) if exposed else None,
        exposed_ms_per_tick=max(each, default=None),
        cuda_graphs=all(r.cuda_graphs for r in reports),
        compiled=all(r.compiled for r in reports),
        compile_s=sum(r.compile_s for r in reports),
        memory=on_each_device([r.memory for r in reports], shared=True),
    )
