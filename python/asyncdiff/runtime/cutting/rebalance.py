"""A split cut again, when its components were timed.

Costs are measured node by node. In a component's CUDA graph the same nodes take a little more or
less, and what a compiler makes of them is only estimated. So the components themselves are timed,
and where they are too unequal the costs of the nodes of each are corrected by one factor, or those
of all nodes on a device that turns out to be slower, and the denoiser is cut again.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from ...errors import PartitionError, ProcessError
from ...graph.capture import Captured, nbytes_of
from ...memory import collect_young, out_of_memory
from ...partition.cost import Costs
from ...partition.exposure import Crossing, exposed_ms
from ...partition.links import Links
from ...partition.memory import Limits
from ...partition.partition import Component, Partition, partition
from ...partition.runs import OF_NODES, typical
from ...phases import phase
from ...processes.team import Team
from ...quiet import undisturbed
from ..cuda_graphs import NotCapturable

if TYPE_CHECKING:
    from ..engine import Engine
    from ..worker import Worker

log = logging.getLogger("asyncdiff")

#: By how much of its time the slowest component has to become faster. A compiler runs for a minute.
WORTH = 0.015
WORTH_COMPILING = 0.03
#: Times that a denoiser is cut again: what moves from one component to another brings that one's
#: share of the correction along, wrongly.
CUTS = 2
#: Milliseconds of the slowest component, below which launches are what is timed.
SHORTEST = 0.5
#: Milliseconds that each component is run for, all at once, and how often at most.
_RUN_FOR = 120.0
_REPLAYS = 200
#: Milliseconds of a short look.
_LOOK_FOR = 40.0


@phase("balance")
@undisturbed()
def component_ms(engine: Engine, look: bool = False) -> list[float] | None:
    """Milliseconds of each component in a CUDA graph without exchange, all at once. Collective.
    A ``look`` takes a third of the time, and is enough where :func:`foreseen`.

    None where that says nothing: on the CPU, where components share a GPU, without graphs, or where
    GPUs have other work too or no memory for more graphs. Call it when the engine is idle.
    """
    count, team = len(engine.partition.components), engine.team
    if not engine.cuda or len({p.unit for p in engine.places[:count]}) < count:
        return None
    workers = [w for w in engine.workers if w.rank < count]
    graphs: list[torch.cuda.CUDAGraph] = []

    def record() -> None:
        for worker in workers:
            with worker.current():
                _fill(worker)
        graphs.extend(engine.graph_alone(w) for w in workers)

    def timed(replays: Sequence[int]) -> list[float]:
        mine = [replays[w.rank] for w in workers]
        found = team.together(
            "time its components", lambda: list(replay(engine, workers, graphs, mine))
        )
        # Ranks lie in the order of processes.
        return [ms for of_process in found for ms in of_process]

    try:
        team.together("time its components", record)
        # Only process 0 is sure to have what was measured.
        expected, busy = team.by(0, "time its components", lambda: _expected(engine.partition))
        once = expected if look else timed([2] * count)
        run_for = _LOOK_FOR if look else _RUN_FOR
        replays = [max(2, min(_REPLAYS, round(run_for / max(ms, 1e-3)))) for ms in once]
        usual = typical(lambda: timed(replays), expected, busy, look)
    except Exception as e:
        team.check()
        elsewhere = isinstance(e, ProcessError)  # which could not do it, and said why
        if not (elsewhere or isinstance(e, NotCapturable) or out_of_memory(e)):
            raise
        log.debug("components are not timed: %s", e)
        return None
    finally:
        with contextlib.suppress(Exception):
            engine.synchronize()
        graphs.clear()
        torch.cuda.empty_cache()  # what the graphs had is not for torch alone
    if usual is None and not look:  # which leaves that to a longer one
        log.info("components are not timed: the GPUs are busy")
    return usual


def foreseen(parts: Partition, team: Team) -> bool:
    """Whether costs say what components take, timed at another size. Collective."""
    known = parts.costs is not None and parts.costs.timed
    return team.by(0, "time its components", lambda: known)


def _fill(worker: Worker) -> None:
    """Values for the component to read, which in use are not all zero either."""
    # Of its own: the user's random numbers stay what they are. From 0 to 1, so that what is used as
    # an index, as integers, stays one.
    generator = torch.Generator(worker.device).manual_seed(0)
    for bundle in worker.mailbox.values():
        for value in bundle:
            if value.is_floating_point():
                value.uniform_(generator=generator)


def replay(
    engine: Engine,
    workers: Sequence[Worker],
    graphs: Sequence[torch.cuda.CUDAGraph],
    replays: Sequence[int],
) -> list[float]:
    """Milliseconds of one of so many replays behind each other, all workers at once."""
    events = []
    for worker, graph, count in zip(workers, graphs, replays, strict=True):
        with worker.current():
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # until then the GPU waits for the launch
            begun.record()
            for _ in range(count):
                graph.replay()
            ended.record()
            events.append((begun, ended))
    collect_young()  # meanwhile
    engine.synchronize()
    return [a.elapsed_time(b) / n for (a, b), n in zip(events, replays, strict=True)]


def next_cut(
    timed: Sequence[tuple[Partition, Sequence[float]]],
    links: Links,
    copies: int = 1,
    worth: float = WORTH,
    limits: Limits | None = None,
    crossing: Crossing = nbytes_of,
) -> Partition | None:
    """What to make in place of the last of the splits that were ``timed``, with the milliseconds of
    their components; None to keep it. See :func:`recut`; of a slower cut, back to the best one.
    """
    parts, times = timed[-1]
    each = [_tick_ms(p, t, links, copies, crossing) for p, t in timed]
    if min(each) < each[-1]:
        return timed[each.index(min(each))][0]
    if len(timed) > CUTS:
        return None
    return recut(parts, times, links, copies, worth, limits, crossing)


def recut(
    parts: Partition,
    times: Sequence[float],
    links: Links,
    copies: int = 1,
    worth: float = WORTH,
    limits: Limits | None = None,
    crossing: Crossing = nbytes_of,
) -> Partition | None:
    """The split under costs that ``times``, milliseconds by component, have corrected.

    None where the slowest component, with what it sends too late, is not expected to become faster
    by the share ``worth``.
    ``parts`` is an automatic split; ``links``, ``copies``, ``limits`` and ``crossing`` (there
    ``nbytes``) are those of
    :func:`~asyncdiff.partition.partition.partition`.
    """
    assert parts.costs is not None
    if max(times) < SHORTEST:
        return None
    slowest = _tick_ms(parts, times, links, copies, crossing)
    costs = corrected(parts, parts.costs, times)
    count = len(parts.components)
    told = ", ".join(f"{t:.2f}" for t in times)
    if _least(parts, costs) >= (1 - worth) * slowest:
        log.info("components take %s ms: no cut is worth it", told)
        return None
    try:
        new = partition(
            parts.captured,
            count,
            costs=costs,
            links=links,
            copies=copies,
            limits=limits,
            nbytes=crossing,
        )
    except PartitionError:  # the split that there is works
        return None
    ms = [_ms(new.captured, c, costs) for c in new.components]
    expected = _tick_ms(new, ms, links, copies, crossing)
    better = expected < (1 - worth) * slowest
    log.info(
        "components take %s ms; cut again, at most %.2f ms: %s",
        told,
        expected,
        "done" if better else "not worth it",
    )
    return new if better else None


def _least(parts: Partition, costs: Costs) -> float:
    """Milliseconds of the slowest component that no cut goes below: what components own lies in one
    of them, however the denoiser is cut. 0 where devices are unequal."""
    if costs.each:
        return 0.0
    owned = (costs.ms[node] for component in parts.components for node in component.owned)
    return sum(owned) / len(parts.components)


def _tick_ms(
    parts: Partition, times: Sequence[float], links: Links, copies: int, crossing: Crossing
) -> float:
    """Milliseconds of a tick whose components take ``times``: until the last one has computed, and
    what it sends has arrived."""
    late = exposed_ms(parts, links, crossing, copies)
    return max(ms + more for ms, more in zip(times, late, strict=True))


def corrected(parts: Partition, costs: Costs, times: Sequence[float]) -> Costs:
    """Costs under which components take ``times``, milliseconds by component.

    By up to a tenth it is a component's nodes that take another time than was measured of them one
    by one. A device whose component takes still longer than that is slower, for whatever else it
    does: for all nodes.
    """
    factors = [
        time / max(_ms(parts.captured, component, costs), 1e-9)
        for component, time in zip(parts.components, times, strict=True)
    ]
    least = min(factors)
    of_device = [f / least if f > OF_NODES * least else 1.0 for f in factors]
    of_node = {
        node: factor / device
        for component, factor, device in zip(parts.components, factors, of_device, strict=True)
        for node in component.owned
    }
    source = f"{costs.source}, corrected by components"

    def table(ms: Mapping[fx.Node, float], device: float) -> dict[fx.Node, float]:
        return {node: time * of_node.get(node, 1.0) * device for node, time in ms.items()}

    each: tuple[dict[fx.Node, float], ...] = ()
    busy = set(of_device) != {1.0}
    if costs.each or busy:
        each = tuple(table(costs.on(i), device) for i, device in enumerate(of_device))
    ms = table(costs.ms, of_device[0])
    busy = costs.busy or busy
    return replace(costs, ms=ms, source=source, each=each, busy=busy, timed=True)


def _expected(parts: Partition) -> tuple[list[float], bool]:
    """Milliseconds of each component by its nodes, and whether a device is known to be busy."""
    costs = parts.costs
    assert costs is not None
    return [_ms(parts.captured, c, costs) for c in parts.components], costs.busy


def _ms(captured: Captured, component: Component, costs: Costs) -> float:
    """What a component's nodes cost in every run."""
    ms = costs.on(component.index)
    return sum(ms[n] for n in component.nodes if captured.each_run(n))
