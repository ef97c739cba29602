"""How long a plan takes on paper: a discrete simulation of its actions.

The model, so that its figures can be judged:

* A rank has one compute queue (runs, and the sampler's update on rank 0) and one port out. What a
  rank sends leaves through the port one bundle after another: one receiver's, then the next's.
* A bundle leaves while its component still runs, except for its tail, which exists only when the
  run ends. It has arrived one link latency after its last byte left.
* A run starts once its latents and every bundle that the plan takes before it have arrived. A
  bundle waits at the port until the receiver has given back the slot that it goes to.
* Rank 0 holds the pipeline: noise predictions come to it, and new latents leave it, one latency
  later (they are small against boundaries, so they take no port time).
* Micro-batches wait for their own predictions only; the sampler's update of one runs beside rank
  0's component.

Launch overhead, slow-downs by traffic in memory, and jitter are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from ..errors import PlanError
from .actions import NOTHING, Action, Kind
from .plan import Plan

Pair = tuple[int, int]


@dataclass(frozen=True)
class Timing:
    """What a plan's parts cost.

    ``component_ms``: milliseconds of one run of each component. ``boundary_bytes``: bytes of the
    bundle from component i to component j (pairs left out: 0, a bare signal). ``tail_bytes``: how
    many of them are produced last and so cannot overlap the run. ``link_gb_per_s``: one way,
    10^9 bytes a second. ``link_latency_us``: microseconds. ``update_ms``: the sampler's update of
    one step, milliseconds. ``whole_ms``: milliseconds of the whole denoiser on one device, where
    that is not the sum of components (None: it is).
    """

    component_ms: tuple[float, ...]
    boundary_bytes: Mapping[Pair, int] = field(default_factory=dict)
    tail_bytes: Mapping[Pair, int] = field(default_factory=dict)
    link_gb_per_s: float = math.inf
    link_latency_us: float = 0.0
    update_ms: float = 0.0
    whole_ms: float | None = None

    @classmethod
    def from_report(cls, report: Mapping[str, Any], **links: float) -> Timing:
        """From a partition report's ``to_dict()``; ``links`` are those of links and update."""
        bundles = {(b["source"], b["target"]): b for b in report["boundaries"]}
        return cls(
            tuple(float(c["ms"]) for c in report["components"]),
            {pair: int(b["bytes"]) for pair, b in bundles.items()},
            {pair: int(b.get("tail_bytes", 0)) for pair, b in bundles.items()},
            whole_ms=report.get("whole_ms"),
            **links,
        )

    def check(self, plan: Plan) -> None:
        """Raise PlanError where these costs do not belong to ``plan``, or are no costs."""
        if len(self.component_ms) != plan.components:
            raise PlanError(
                f"{len(self.component_ms)} component times for a plan of {plan.components} "
                "components: give one for each"
            )
        costs = (*self.component_ms, self.link_latency_us, self.update_ms, self.whole_ms or 0.0)
        if any(not (math.isfinite(c) and c >= 0) for c in costs):
            raise PlanError(f"component, latency and update times must be 0 or more: {costs}")
        if not self.link_gb_per_s > 0:
            raise PlanError(
                f"a link of {self.link_gb_per_s} GB/s carries nothing: take more than 0"
            )
        edges = {(e.source, e.target) for e in plan.exchanges}
        for pair in {*self.boundary_bytes, *self.tail_bytes}:
            size, tail = self.boundary_bytes.get(pair, 0), self.tail_bytes.get(pair, 0)
            if plan.schedule == "sequence":
                raise PlanError(
                    f"boundary {pair[0]}->{pair[1]}: ranks that share out tokens exchange them "
                    "inside of their runs, of which no time is predicted: leave boundaries out"
                )
            if pair not in edges:
                raise PlanError(f"boundary {pair[0]}->{pair[1]} is no exchange of this plan")
            if not 0 <= tail <= size:
                raise PlanError(f"boundary {pair[0]}->{pair[1]}: {tail} tail bytes of {size}")


class SpanKind(str, Enum):
    """What a rank is busy with: its component, its port out, or the sampler's update."""

    RUN = "run"
    EXCHANGE = "exchange"
    UPDATE = "update"


@dataclass(frozen=True)
class Span:
    """A stretch of time on a rank, in milliseconds. ``target``: the receiving rank of an exchange;
    ``time``: the timestep index of a run."""

    rank: int
    tick: int
    kind: SpanKind
    start_ms: float
    end_ms: float
    component: int
    target: int | None = None
    time: int | None = None

    @property
    def ms(self) -> float:
        """Length in milliseconds."""
        return self.end_ms - self.start_ms


@dataclass(frozen=True)
class Timeline:
    """When everything happens.

    ``total_ms``: until the last update, when the latents are ready; runs and bundles of the last
    tick whose results nobody reads may end later.
    ``exposed_ms``: how much of it would be gone if links took no time. ``sequential_ms``: the same
    steps, of one micro-batch after another, on one device. ``busy``: by rank, the share of the
    total that it computes (0 … 1).
    """

    plan: Plan
    timing: Timing
    spans: tuple[Span, ...]
    total_ms: float
    exposed_ms: float
    sequential_ms: float
    busy: tuple[float, ...]
    exchange_bytes: int

    @property
    def speedup(self) -> float:
        """Sequential over total. At most N times S in the published schedule: a stride repeats only
        the last component. Waves that nobody waits for are not run, so that short generations of a
        wavefront may come out a little above."""
        return self.sequential_ms / self.total_ms if self.total_ms else 1.0

    def of(self, rank: int, tick: int | None = None) -> tuple[Span, ...]:
        """Spans of a rank (in one tick)."""
        return tuple(s for s in self.spans if s.rank == rank and tick in (None, s.tick))

    def tick_bounds(self, tick: int) -> tuple[float, float]:
        """First start and last end of a tick's runs and updates, milliseconds."""
        spans = [s for s in self.spans if s.tick == tick and s.kind is not SpanKind.EXCHANGE]
        return min(s.start_ms for s in spans), max(s.end_ms for s in spans)

    def to_dict(self) -> dict[str, Any]:
        """The summary, and the bounds of each tick, for JSON."""
        return {
            "total_ms": self.total_ms, "sequential_ms": self.sequential_ms,
            "speedup": self.speedup, "exposed_ms": self.exposed_ms,
            "exchange_bytes": self.exchange_bytes, "busy": list(self.busy),
            "ticks": [
                {
                    "index": t.index, "exact": t.exact, "serves": list(t.serves),
                    "start_ms": start, "end_ms": end,
                }
                for t in self.plan.ticks
                for start, end in [self.tick_bounds(t.index)]
            ],
        }  # fmt: skip


def predict(plan: Plan, timing: Timing) -> Timeline:
    """Simulate ``plan`` with these costs. Raises PlanError if they do not belong together."""
    timing.check(plan)
    run = _Simulation(plan, timing)
    # The order of actions is fixed, so taking link time away never makes anything later: >= 0.
    free = replace(timing, boundary_bytes={}, tail_bytes={}, link_latency_us=0.0)
    exposed = run.total - _Simulation(plan, free).total
    busy = [0.0] * plan.ranks
    for s in run.spans:
        if s.kind is not SpanKind.EXCHANGE:
            busy[s.rank] += min(s.end_ms, run.total) - min(s.start_ms, run.total)
    whole = sum(timing.component_ms) if timing.whole_ms is None else timing.whole_ms
    sequential = plan.steps * plan.microbatches * (whole + timing.update_ms)
    shares = tuple(min(1.0, b / run.total) if run.total else 0.0 for b in busy)
    return Timeline(
        plan, timing, tuple(run.spans), run.total, max(0.0, exposed), sequential, shares,
        run.sent_bytes,
    )  # fmt: skip


class _Simulation:
    """Issues the actions of a plan in order and keeps, in milliseconds, when everything is free."""

    def __init__(self, plan: Plan, timing: Timing) -> None:
        self.plan = plan
        self.timing = timing
        self.latency = timing.link_latency_us / 1e3
        self.spans: list[Span] = []
        self.total = 0.0
        self.sent_bytes = 0
        self.queue = [0.0] * plan.ranks  # when a rank's compute queue is free
        self.port = [0.0] * plan.ranks
        # When the newest latents of a micro-batch are on a rank; when its bundles, by (micro-batch,
        # source, ordinal, receiving rank), have arrived and are given back.
        self.latents = [[0.0] * plan.ranks for _ in range(plan.microbatches)]
        self.arrived: dict[tuple[int, int, int, int], float] = {}
        self.freed: dict[tuple[int, int, int, int], float] = {}
        for tick in plan.ticks:
            self.part = tick.microbatch
            actions = [a for segment in tick.segments for a in segment.actions]
            runs = [i for i, a in enumerate(actions) if a.kind is Kind.RUN]
            # After its last run, before what the plan still takes only to leave channels empty.
            update = runs[-1] + 1 if runs else 0
            delivered = max((self._act(tick.index, a) for a in actions[:update]), default=0.0)
            self._update(tick.index, len(tick.serves), delivered)
            for a in actions[update:]:
                self._act(tick.index, a)

    def _act(self, tick: int, a: Action) -> float:
        """Issue an action. When rank 0 has the noise prediction that it delivers; else 0."""
        bundle = self.part, a.component, a.ordinal, a.rank
        if a.kind is Kind.GET:
            self.queue[a.rank] = max(self.queue[a.rank], self.arrived[bundle])
        elif a.kind is Kind.RELEASE:
            self.freed[bundle] = self.queue[a.rank]
        else:
            end = self._run(tick, a)
            if a.step is not None:
                return end + (self.latency if a.rank else 0.0)
        return 0.0

    def _run(self, tick: int, a: Action) -> float:
        start = max(self.queue[a.rank], self.latents[self.part][a.rank])
        end = start + self.timing.component_ms[a.component]
        self.queue[a.rank] = end
        self.spans.append(Span(a.rank, tick, SpanKind.RUN, start, end, a.component, None, a.time))
        if a.ordinal != NOTHING:
            self._send(tick, a, start, end)
        return end

    def _send(self, tick: int, a: Action, start: float, end: float) -> None:
        pairs = [(e.source, e.target) for e in self.plan.exchanges if e.source == a.component]
        receivers = [(pair, rank) for pair in pairs for rank in self.plan.ranks_of(pair[1])]
        for late in (False, True):  # what exists early leaves first, to all receivers
            for pair, rank in receivers:
                tail = self.timing.tail_bytes.get(pair, 0)
                size = tail if late else self.timing.boundary_bytes.get(pair, 0) - tail
                older = self.part, a.component, a.ordinal - self.plan.slots, rank
                slot = self.freed.get(older, 0.0)
                begin = max(self.port[a.rank], slot, end if late else start)
                done = begin + size / (self.timing.link_gb_per_s * 1e6)
                if size:
                    self.port[a.rank] = done
                    self.sent_bytes += size
                    self.spans.append(
                        Span(a.rank, tick, SpanKind.EXCHANGE, begin, done, a.component, rank)
                    )
                if late:  # the signal follows the last byte, and never precedes the run's end
                    bundle = self.part, a.component, a.ordinal, rank
                    self.arrived[bundle] = max(done, end) + self.latency

    def _update(self, tick: int, steps: int, delivered: float) -> None:
        pipelined = self.plan.schedule == "pipeline"
        start = delivered if pipelined else max(self.queue[0], delivered)
        end = start + steps * self.timing.update_ms
        if not pipelined:
            self.queue[0] = end
        self.total = max(self.total, end)
        self.spans.append(Span(0, tick, SpanKind.UPDATE, start, end, 0))
        self.latents[self.part] = [
            end + (self.latency if rank else 0.0) for rank in range(self.plan.ranks)
        ]


def summary(timeline: Timeline) -> str:
    """A few lines for people."""
    t, p = timeline, timeline.plan
    busy = " ".join(f"{100 * b:.0f}%" for b in t.busy)
    return (
        f"N={p.components} S={p.stride} w={p.warmup} T={p.steps} on {p.ranks} ranks: "
        f"{t.total_ms:.1f} ms, sequentially {t.sequential_ms:.1f} ms, {t.speedup:.2f} times\n"
        f"exchange {t.exchange_bytes / 2**20:.1f} MiB, of which {t.exposed_ms:.2f} ms exposed; "
        f"ranks compute {busy} of the time"
    )
