"""Which rank runs which component when: a generation as plain data.

A plan is made of ticks, a tick of actions in a legal issue order: whoever issues the actions of a
plan one after another, each to its rank, never waits for something that was not issued before.
This file imports neither torch nor devices; it can be tested, printed and studied on paper.

Words (see docs/design.md): N components, stride S, w exact warm-up steps, T sampler steps. The
schedules are in published.py, wavefront.py and pipeline.py; what they share is in builder.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import PlanError
from .actions import Action, Exchange, Kind, Tick
from .builder import Builder
from .pipeline import in_turn
from .published import Published
from .wavefront import Waves, lagged

__all__ = [
    "ASYNCHRONOUS", "EXACT", "SCHEDULES", "Action", "Exchange", "Kind", "Plan", "Tick", "build",
    "chain", "check_delay", "check_numbers", "check_schedule", "rank_count", "ring", "wave_delay",
]  # fmt: skip

#: "asyncdiff": as published. "wavefront": see :mod:`asyncdiff.schedule.wavefront`.
ASYNCHRONOUS = ("asyncdiff", "wavefront")
#: Those of which every step is exact. "pipeline": see :mod:`asyncdiff.schedule.pipeline`.
#: "sequence": all ranks run each step at once, each on its share of the tokens.
EXACT = ("pipeline", "sequence")
SCHEDULES = (*ASYNCHRONOUS, *EXACT)


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
    schedule: str = "asyncdiff"
    exact_tail: int = 0
    extrapolate: float = 0.0
    #: ticks from a wave's start to its prediction; 0 in other schedules
    delay: int = 0
    #: parts of the batch that take turns, in the pipeline schedule
    microbatches: int = 1

    @property
    def ranks(self) -> int:
        """World size: N + S − 1; N in all schedules but the published one."""
        return rank_count(self.components, self.stride, self.schedule)

    def component_of(self, rank: int) -> int:
        """The component that ``rank`` holds; copies hold the last one."""
        return min(rank, self.components - 1)

    def ranks_of(self, component: int) -> tuple[int, ...]:
        """The ranks that hold ``component``: itself, and for the last one its copies too."""
        if component == self.components - 1:
            return tuple(range(component, self.ranks))
        return (component,)


def chain(components: int) -> tuple[Exchange, ...]:
    """Every component sends to every later one, lag one: the exchanges of a UNet with skips."""
    return tuple(Exchange(i, j) for j in range(components) for i in range(j))


def rank_count(components: int, stride: int, schedule: str) -> int:
    """World size: copies of the last component serve the published schedule's stride."""
    return components + stride - 1 if schedule == "asyncdiff" else components


def wave_delay(components: int, schedule: str, delay: int | None = None) -> int:
    """The delay of plans of this schedule: ``delay``, or where that is None N − 1. 0 for other
    schedules, and where one component does it all."""
    if schedule != "wavefront" or components == 1:
        return 0
    return components - 1 if delay is None else delay


def ring(
    exchanges: Sequence[Exchange],
    components: int,
    schedule: str = "asyncdiff",
    extrapolate: float = 0.0,
    delay: int | None = None,
) -> int:
    """Slots of the rings that a schedule needs: a bundle is kept until its reader has used it.

    One depth for all channels: then the slots that a rank uses repeat after so many ticks, and a
    CUDA graph is recorded for each of them, not for every combination of several depths.
    """
    if schedule == "wavefront":
        late = wave_delay(components, schedule, delay)
        return max([2, *(e.lag + 1 for e in lagged(exchanges, components, late))])
    return 3 if extrapolate else 2


def check_schedule(
    schedule: str,
    *,
    stride: int = 1,
    time_shift: bool = False,
    extrapolate: float = 0.0,
    exact_tail: int = 0,
) -> None:
    """Raise :class:`PlanError` for an unknown schedule, or options that it does not have."""
    if schedule not in SCHEDULES:
        raise PlanError(f"schedule={schedule!r}: write one of {', '.join(SCHEDULES)}")
    if not _is_whole(exact_tail, 0):
        raise PlanError(f"exact_tail must be a whole number of at least 0, not {exact_tail!r}")
    if not 0 <= extrapolate <= 2:
        raise PlanError(f"extrapolate={extrapolate!r}: take 0 (off) to 2; 1 is a straight line")
    if schedule in EXACT:
        _check_exact(schedule, stride, time_shift, extrapolate, exact_tail)
    if schedule == "wavefront" and time_shift:
        raise PlanError(
            "time_shift belongs to schedule='asyncdiff': a wave runs at its own timestep"
        )
    if schedule == "wavefront" and extrapolate:
        raise PlanError(
            "extrapolate belongs to schedule='asyncdiff': no value inside a wave is stale. What a "
            "wavefront extrapolates is the clean image: see order"
        )


def _check_exact(
    schedule: str, stride: int, time_shift: bool, extrapolate: float, exact_tail: int
) -> None:
    several = isinstance(stride, int) and stride > 1
    options = {"time_shift": time_shift, "extrapolate": extrapolate, "exact_tail": exact_tail}
    for name, given in {"stride": several, **options}.items():
        if given:
            raise PlanError(
                f"{name} does not go with schedule={schedule!r}, in which every step is exact: "
                "leave it out, or take another schedule"
            )


def check_delay(delay: int | None, schedule: str, components: int) -> None:
    """Raise :class:`PlanError` for a delay that waves of so many components cannot have."""
    if delay is None:
        return
    if schedule != "wavefront":
        raise PlanError(
            "delay belongs to schedule='wavefront': here every prediction is one of its own step"
        )
    if not _is_whole(delay, 1) or delay >= components:
        raise PlanError(
            f"delay={delay!r}: waves of {components} components arrive after 1 to "
            f"{components - 1} ticks; None takes what measured best"
            if components > 1
            else f"delay={delay!r}: with one component nothing is late; leave it at None"
        )


def check_numbers(
    components: int, stride: int, warmup: int, steps: int | None = None, exact_tail: int = 0
) -> None:
    """Raise :class:`PlanError` if no plan has these numbers (``steps=None``: not known yet)."""
    for name, value in (("components", components), ("stride", stride), ("warmup", warmup)):
        if not _is_whole(value, 1):
            raise PlanError(f"{name} must be a whole number of at least 1, not {value!r}")
    if steps is None:
        return
    if not _is_whole(steps, 1):
        raise PlanError(f"steps must be a whole number of at least 1, not {steps!r}")
    if warmup > steps:
        raise PlanError(
            f"warmup={warmup} exceeds the {steps} steps of this generation: "
            f"take warmup <= {steps} (warmup = steps runs every step exactly), or more steps"
        )
    if warmup + exact_tail > steps:
        raise PlanError(
            f"warmup={warmup} and exact_tail={exact_tail} exceed the {steps} steps of this "
            f"generation: take exact_tail <= {steps - warmup}, or more steps"
        )


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def build(
    components: int,
    stride: int = 1,
    warmup: int = 1,
    steps: int = 50,
    *,
    schedule: str = "asyncdiff",
    exact_tail: int = 0,
    time_shift: bool = False,
    extrapolate: float = 0.0,
    delay: int | None = None,
    microbatches: int | None = None,
    exchanges: Sequence[Exchange] | None = None,
    exact_order: Sequence[int] | None = None,
) -> Plan:
    """The plan for N = ``components``, S = ``stride``, w = ``warmup``, T = ``steps``.

    ``exact_tail``: the last so many steps are run exactly, like the first w.
    ``exchanges`` says which components send to which (default: each to all later ones); their lags
    are the schedule's.
    ``exact_order`` is the order of runs of an exact step (default 0 … N−1). Where components
    depend on each other in a circle, as hand-made splits may, it names some more than once: a
    later run of the same component finds what it lacked the first time.

    Of schedule "asyncdiff" only: ``time_shift``; ``extrapolate``, by how much of the last change
    the values of other components are moved on before they are used (0: they are used as they
    came). Of "wavefront" only: ``delay``, ticks from a wave's start to its prediction, from 1
    to N − 1 (None: N − 1). Of "pipeline" only:
    ``microbatches`` (None: as many as components). In this and in "sequence", where ``components``
    is the number of ranks and they exchange nothing but inside of their runs, every step is exact,
    whatever ``warmup`` is.

    Raises PlanError for numbers and options that no plan has.
    """
    check_schedule(
        schedule,
        stride=stride,
        time_shift=time_shift,
        extrapolate=extrapolate,
        exact_tail=exact_tail,
    )
    if schedule in EXACT:
        warmup = steps
    if schedule == "sequence":
        exchanges = ()
    check_numbers(components, stride, warmup, steps, exact_tail)
    check_delay(delay, schedule, components)
    edges = tuple(chain(components) if exchanges is None else exchanges)
    order = tuple(range(components) if exact_order is None else exact_order)
    _check_edges(components, edges, order)
    if extrapolate and len(order) > components:
        raise PlanError(
            "extrapolate needs components that follow each other: these depend on each other in a "
            "circle. Split by cuts (split='auto' or 'estimate'), or leave extrapolate at 0"
        )
    slots = ring(edges, components, schedule, extrapolate, delay)
    late = wave_delay(components, schedule, delay)
    builder: Builder
    if schedule == "wavefront":
        edges = lagged(edges, components, late)
        builder = Waves(components, stride, edges, slots, late)
    else:
        held = 2 if extrapolate else 1
        builder = Published(
            components, stride, edges, slots, order=order, held=held, shift=int(time_shift)
        )
    ticks = builder.ticks(warmup, steps, exact_tail)
    parts = _microbatches(components, schedule, microbatches)
    if schedule == "pipeline":
        ticks = in_turn(ticks, parts)
    return Plan(
        components, stride, warmup, steps, time_shift, slots, edges, ticks,
        schedule, exact_tail, float(extrapolate), late, parts,
    )  # fmt: skip


def _microbatches(components: int, schedule: str, given: int | None) -> int:
    if given is None:
        return components if schedule == "pipeline" else 1
    if not _is_whole(given, 1):
        raise PlanError(f"microbatches must be a whole number of at least 1, not {given!r}")
    if schedule != "pipeline" and given != 1:
        raise PlanError("microbatches belong to schedule='pipeline': others run the batch as it is")
    return given


def _check_edges(components: int, edges: Iterable[Exchange], order: Sequence[int]) -> None:
    for e in edges:
        if not (0 <= e.source < components and 0 <= e.target < components) or e.source == e.target:
            raise PlanError(f"exchange {e.source}->{e.target} does not fit {components} components")
    if set(order) != set(range(components)):
        raise PlanError(f"exact_order {tuple(order)} must name each of {components} components")
