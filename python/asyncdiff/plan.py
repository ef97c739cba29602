"""Which rank runs which component when: a generation as plain data.

A plan is made of ticks, a tick of actions in a legal issue order: whoever issues the actions of a
plan one after another, each to its rank, never waits for something that was not issued before.
This file imports neither torch nor devices; it can be tested, printed and studied on paper.

Words (see docs/design.md): N components, stride S, w exact warm-up steps, T sampler steps.
Rank i < N runs component i; rank N+o (o = 0 … S−2) runs a copy of the last component.

The schedule is that of AsyncDiff (Chen et al., NeurIPS 2024), with stride denoising as the paper
describes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from .errors import PlanError


class Kind(str, Enum):
    """What an action does on its rank."""

    GET = "G"  #: wait for the next bundle from a component
    RUN = "R"  #: run the rank's component, then push its boundary
    RELEASE = "L"  #: give the oldest held bundle back to its sender


@dataclass(frozen=True)
class Action:
    """One thing that one rank does.

    ``component`` is the component that runs (RUN) or whose bundle is taken or given back (GET,
    RELEASE). The other fields belong to RUN: ``latents`` is the step whose latents are the input,
    ``time`` the index of the timestep, ``step`` the step whose noise prediction this run delivers
    (None if its output is not used), ``put`` the ordinal of the bundle that it sends (None for
    runs that send nothing), ``reads`` the ordinals of the bundles read, by sending component.
    """

    kind: Kind
    rank: int
    component: int
    latents: int | None = None
    time: int | None = None
    step: int | None = None
    put: int | None = None
    reads: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Tick:
    """A batch of runs: one after another (``exact``) or all at once.

    ``serves`` are the sampler steps whose noise predictions come out of it.
    """

    index: int
    exact: bool
    serves: tuple[int, ...]
    actions: tuple[Action, ...]

    @property
    def runs(self) -> tuple[Action, ...]:
        """The runs of this tick, in issue order."""
        return tuple(a for a in self.actions if a.kind is Kind.RUN)

    def of_rank(self, rank: int) -> tuple[Action, ...]:
        """The actions of one rank, in order."""
        return tuple(a for a in self.actions if a.rank == rank)


@dataclass(frozen=True)
class Exchange:
    """Bundles from component ``source`` to ``target``, used ``lag`` ticks after they were made."""

    source: int
    target: int
    lag: int = 1


@dataclass(frozen=True)
class Plan:
    """A whole generation. Build one with :func:`build`."""

    components: int
    stride: int
    warmup: int
    steps: int
    time_shift: bool
    slots: int
    exchanges: tuple[Exchange, ...]
    ticks: tuple[Tick, ...]

    @property
    def ranks(self) -> int:
        """World size N + S − 1."""
        return self.components + self.stride - 1

    def component_of(self, rank: int) -> int:
        """The component that ``rank`` holds; copies hold the last one."""
        return min(rank, self.components - 1)

    def ranks_of(self, component: int) -> tuple[int, ...]:
        """The ranks that hold ``component``: itself, and for the last one its copies too."""
        if component == self.components - 1:
            return tuple(range(component, self.ranks))
        return (component,)

    def sources_of(self, component: int) -> tuple[int, ...]:
        """The components whose bundles ``component`` reads."""
        return tuple(e.source for e in self.exchanges if e.target == component)

    def tick_of_step(self, step: int) -> Tick:
        """The tick that delivers the noise prediction of ``step``."""
        for tick in self.ticks:
            if step in tick.serves:
                return tick
        raise PlanError(f"step {step} is not in this plan of {self.steps} steps")


def chain(components: int) -> tuple[Exchange, ...]:
    """Every component sends to every later one, lag one: the exchanges of a UNet with skips."""
    return tuple(Exchange(i, j) for j in range(components) for i in range(j))


def check_numbers(components: int, stride: int, warmup: int, steps: int | None = None) -> None:
    """Raise :class:`PlanError` if no plan has these numbers (``steps=None``: not known yet)."""
    for name, value in (("components", components), ("stride", stride), ("warmup", warmup)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PlanError(f"{name} must be a whole number of at least 1, not {value!r}")
    if steps is None:
        return
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise PlanError(f"steps must be a whole number of at least 1, not {steps!r}")
    if warmup > steps:
        raise PlanError(
            f"warmup={warmup} exceeds the {steps} steps of this generation: "
            f"take warmup <= {steps} (warmup = steps runs every step exactly), or more steps"
        )


def build(
    components: int,
    stride: int = 1,
    warmup: int = 1,
    steps: int = 50,
    *,
    time_shift: bool = False,
    exchanges: Sequence[Exchange] | None = None,
    exact_order: Sequence[int] | None = None,
    slots: int = 2,
) -> Plan:
    """The published schedule for N = ``components``, S = ``stride``, w = ``warmup``, T = ``steps``.

    ``exchanges`` says which components send to which (default: each to all later ones).
    ``exact_order`` is the order of runs of an exact step (default 0 … N−1). Where components
    depend on each other in a circle, as hand-made splits may, it names some more than once: a
    later run of the same component finds what it lacked the first time.

    Raises PlanError for numbers that no plan has.
    """
    check_numbers(components, stride, warmup, steps)
    edges = tuple(chain(components) if exchanges is None else exchanges)
    order = tuple(range(components) if exact_order is None else exact_order)
    _check_edges(components, edges, order, slots)
    builder = _Builder(components, stride, edges, slots)
    ticks: list[Tick] = []
    for k in range(warmup):
        ticks.append(builder.exact_tick(len(ticks), k, order))
    k = warmup
    while k < steps:
        ticks.append(builder.tick(len(ticks), k, min(k + stride, steps), time_shift))
        k += stride
    if ticks:
        last = ticks[-1]
        ticks[-1] = Tick(last.index, last.exact, last.serves, last.actions + builder.drain())
    return Plan(components, stride, warmup, steps, time_shift, slots, edges, tuple(ticks))


def _shifted(time: int, time_shift: bool) -> int:
    return time - 1 if time_shift else time


def _check_edges(
    components: int, edges: Iterable[Exchange], order: Sequence[int], slots: int
) -> None:
    for e in edges:
        if not (0 <= e.source < components and 0 <= e.target < components) or e.source == e.target:
            raise PlanError(f"exchange {e.source}->{e.target} does not fit {components} components")
        if e.lag != 1:
            raise PlanError(f"exchange {e.source}->{e.target}: this schedule has lag 1 only")
    if set(order) != set(range(components)):
        raise PlanError(f"exact_order {tuple(order)} must name each of {components} components")
    if slots < 2:
        raise PlanError(f"slots={slots}: a mailbox needs at least two slots")


class _Builder:
    """Emits ticks and keeps count of what was put, taken and given back."""

    def __init__(
        self, components: int, stride: int, edges: tuple[Exchange, ...], slots: int
    ) -> None:
        self.n = components
        self.stride = stride
        self.slots = slots
        self.sources = {c: [e.source for e in edges if e.target == c] for c in range(components)}
        self.senders = {e.source for e in edges}
        self.puts = [0] * components  # bundles sent so far, by component
        ranks = range(components + stride - 1)
        self.got = {r: dict.fromkeys(self.sources[self.component(r)], 0) for r in ranks}
        self.freed = {r: dict.fromkeys(self.sources[self.component(r)], 0) for r in ranks}

    def component(self, rank: int) -> int:
        return min(rank, self.n - 1)

    def catch_up(self, rank: int) -> list[Action]:
        """Give back what is older, and take, every bundle sent so far: the newest one is held."""
        out = []
        for source in self.sources[self.component(rank)]:
            while self.got[rank][source] < self.puts[source]:
                if self.freed[rank][source] < self.got[rank][source]:
                    out.append(Action(Kind.RELEASE, rank, source))
                    self.freed[rank][source] += 1
                out.append(Action(Kind.GET, rank, source))
                self.got[rank][source] += 1
        return out

    def give_back(self, rank: int) -> list[Action]:
        out = []
        for source in self.sources[self.component(rank)]:
            while self.freed[rank][source] < self.got[rank][source]:
                out.append(Action(Kind.RELEASE, rank, source))
                self.freed[rank][source] += 1
        return out

    def run(self, rank: int, latents: int, time: int, step: int | None, sends: bool) -> Action:
        component = self.component(rank)
        # got - 1 is the newest bundle held; -1 where none was ever sent (first run in a circle)
        reads = tuple((s, self.got[rank][s] - 1) for s in self.sources[component])
        put = None
        if sends and component in self.senders:
            put = self.puts[component]
            self.puts[component] += 1
        return Action(Kind.RUN, rank, component, latents, time, step, put, reads)

    def exact_tick(self, index: int, k: int, order: tuple[int, ...]) -> Tick:
        actions: list[Action] = []
        final = {c: i for i, c in enumerate(order)}
        for i, component in enumerate(order):
            actions += self.catch_up(component)
            delivers = k if component == self.n - 1 and final[component] == i else None
            actions.append(self.run(component, k, k, delivers, sends=True))
        for rank in self.got:  # copies, and whoever ran before its sources did: hold the newest
            actions += self.catch_up(rank)
        return Tick(index, True, (k,), tuple(actions))

    def tick(self, index: int, k: int, end: int, time_shift: bool) -> Tick:
        # A last tick with fewer steps left than S serves them with the copies first.
        serves = tuple(range(k, end))
        full = len(serves) == self.stride
        actions: list[Action] = []
        for rank in self.got:
            actions += self.catch_up(rank)
        if full:  # else the copies serve what is left, and nobody reads what the others would send
            time = _shifted(k + self.stride - 1, time_shift)
            for rank in range(self.n):
                step = end - 1 if rank == self.n - 1 else None
                actions.append(self.run(rank, k, time, step, sends=True))
        for o in range(self.stride - 1):
            if k + o < end:
                time = _shifted(k + o, time_shift)
                actions.append(self.run(self.n + o, k, time, k + o, sends=False))
        for rank in self.got:
            actions += self.give_back(rank)
        return Tick(index, False, serves, tuple(actions))

    def drain(self) -> tuple[Action, ...]:
        """Take and give back what nobody will read, so that the channels end empty."""
        out: list[Action] = []
        for rank in self.got:
            out += self.catch_up(rank)
            out += self.give_back(rank)
        return tuple(out)
