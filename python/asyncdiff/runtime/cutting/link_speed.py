"""How fast bundles travel between ranks, by pair and direction, one alone or several at once: by
channels like those of engines."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import asyncdiff_core as core

from ...partition.links import Link, Links, Pair
from ...phases import phase
from ...preparation.links import KeptLinks
from ...processes.team import Team
from ..devices import Place, fabric, uuids_of
from ..exchange.awaited import Awaited, Bundles
from ..exchange.credits import Credits

log = logging.getLogger("asyncdiff")

#: Bytes of the bundles that say how large those are that are timed, and at most of these.
_FIRST, _MOST = 1 << 18, 1 << 25
#: Milliseconds that one of these is to take, and how many are sent.
_MS, _PUTS = 10.0, 8
#: Slots of channels; how often small bundles go there and back in each.
_SLOTS, _ROUNDS = 2, 10
_WHAT = "measure links"


def engine_links(places: Sequence[Place], team: Team) -> Links:
    """The links that components at ``places`` send by, each to the next, all at the same time.
    Collective.

    What ranks of one device, or on one CPU, exchange goes at memory's speed, which is assumed,
    unless links are simulated; so it is, with a warning, where measuring fails in the one process
    that there is: a worse cut is better than none.
    """
    assumed = assumed_links(places)
    chain = _chain(places)
    if not chain:
        return assumed
    try:
        with phase("measure"):
            (found,) = measured(places, [chain], team)
    except core.CoreError as e:
        if team.several:
            raise
        log.warning("links between devices could not be measured, and count as fast: %s", e)
        return assumed
    return Links(assumed.otherwise, found)


def _chain(places: Sequence[Place]) -> list[Pair]:
    """Each rank and the next one, but for those that share a device."""
    simulated = core.simulated_link() is not None
    return [
        (a, b)
        for a, b in itertools.pairwise(range(len(places)))
        if simulated or places[a].unit != places[b].unit
    ]


def once_measured(
    places: Sequence[Place], team: Team, measure: Callable[[Sequence[Place], Team], Links]
) -> Links:
    """What ``measure`` finds of the links between ``places``; those of GPUs of one host are kept
    for other processes. Collective."""
    names = uuids_of(places, team) if core.simulated_link() is None else None
    kept = None if names is None else KeptLinks(names, _chain(places), core.transport())
    known = None if kept is None else team.by(0, _WHAT, kept.get)
    if known is not None:
        return assumed_links(places).of(known)
    found = measure(places, team)
    if kept is not None and team.process == 0:
        kept.keep(found)
    return found


def assumed_links(places: Sequence[Place]) -> Links:
    """As fast as memory, all of them."""
    return Links.alike(1e9 if places[0].device.type == "cuda" else 5e6)


def measured(
    places: Sequence[Place], rounds: Sequence[Sequence[Pair]], team: Team
) -> list[dict[Pair, Link]]:
    """The links of each round's pairs of ranks, all of which send at the same time; latencies are
    those of each pair alone. Collective. Raises what making a fabric and exchanging do."""
    pairs = sorted({pair for each in rounds for pair in each})
    ranks = fabric(places, None, team)
    try:
        with _Bench(ranks, places, team, pairs, _FIRST) as bench:
            slowest = min(rate for r in bench.rates([[p] for p in pairs]) for rate in r.values())
            latencies = bench.latencies()
        nbytes = _FIRST
        while nbytes < _MOST and 2 * nbytes <= slowest * _MS:
            nbytes *= 2
        with _Bench(ranks, places, team, pairs, nbytes) as bench:
            rates = bench.rates(rounds)
        del bench  # and with it what it sends
        ranks.check()
    finally:
        with team.collective():
            ranks.close()
        torch.cuda.empty_cache()  # what is free is for the engine
    return [{pair: Link(rate, latencies[pair]) for pair, rate in r.items()} for r in rates]


class _Bench:
    """Channels for bundles of ``nbytes`` between pairs of ranks, and what this process's ends of
    them do."""

    def __init__(
        self,
        ranks: core.Fabric,
        places: Sequence[Place],
        team: Team,
        pairs: Sequence[Pair],
        nbytes: int,
    ) -> None:
        self._places, self._team, self._pairs, self._nbytes = places, team, pairs, nbytes
        mode = "copy" if places[0].device.type == "cuda" else "auto"  # as engines do
        large = core.Layout([core.TensorSpec("uint8", (nbytes,))])
        small = core.Layout([core.TensorSpec("uint8", (4,))])
        with team.collective():
            self._large = {(a, b): ranks.channel(a, [b], large, mode=mode) for a, b in pairs}
            both = sorted({*pairs, *((b, a) for a, b in pairs)})
            self._small = {(a, b): ranks.channel(a, [b], small, mode=mode) for a, b in both}
        # Between hosts the host waits, and its clock counts: see awaited.py.
        self._credits = Credits()
        self._awaited = {
            channel: Awaited(channel)
            for pair, channel in (*self._large.items(), *self._small.items())
            if self._far(*pair)
        }
        self._data = {
            rank: torch.zeros(nbytes, dtype=torch.uint8, device=places[rank].device)
            for rank in sorted({a for a, _ in both})
            if self._mine(rank)
        }

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, failed: Any, *_: Any) -> None:
        if failed is not None:  # others may not come: the fabric's end frees it
            return
        with self._team.collective():
            for channel in (*self._large.values(), *self._small.values()):
                channel.close()

    def rates(self, rounds: Sequence[Sequence[Pair]]) -> list[dict[Pair, float]]:
        """Bytes a millisecond of each pair, in each round."""
        return [self._together([self._ends(pair) for pair in pairs]) for pairs in rounds]

    def latencies(self) -> dict[Pair, float]:
        """Milliseconds of each pair, half of the way there and back."""
        found: dict[Pair, float] = {}
        for pair in self._pairs:
            found |= self._together([self._there_and_back(pair)])
        return found

    def _far(self, a: int, b: int) -> bool:
        return self._places[a].host != self._places[b].host

    def _put(self, channel: core.Channel, data: torch.Tensor, slot: int, stream: Any) -> None:
        if channel in self._awaited:
            self._credits.take(channel)
        channel.put([data], slot, stream)

    def _end(self, channel: core.Channel) -> Bundles:
        return self._awaited.get(channel, channel)

    def _mine(self, rank: int) -> bool:
        return self._places[rank].process == self._team.process

    def _together(self, ends: Sequence[_Ends]) -> dict[Pair, float]:
        """Run the ends of all, at the same time; what they find, of all processes."""
        works = [work for both in ends for work in both]

        def run() -> list[tuple[int, int, float]]:
            if not works:
                return []
            with ThreadPoolExecutor(len(works)) as pool:
                done = [future.result() for future in [pool.submit(work) for work in works]]
            return [x for x in done if x is not None]

        for rank in self._data:
            if self._places[rank].device.type == "cuda":
                torch.cuda.synchronize(self._places[rank].device)
        self._team.together(_WHAT, lambda: None)  # so that they begin together
        found = self._team.together(_WHAT, run)
        return {(a, b): value for each in found for a, b, value in each}

    def _ends(self, pair: Pair) -> _Ends:
        """Bundles one after another: bytes a millisecond, by when they arrive."""
        channel = self._large[pair]
        source, target = pair
        end, far = self._end(channel), self._far(*pair)

        def send() -> None:
            with _Clock(self._places[source].device, far) as clock:
                for n in range(_PUTS):
                    self._put(channel, self._data[source], n % _SLOTS, clock.stream)

        def receive() -> tuple[int, int, float]:
            with _Clock(self._places[target].device, far) as clock:
                for n in range(_PUTS):
                    end.get(target, n % _SLOTS, clock.stream)
                    clock.look()
                    end.release(target, n % _SLOTS, clock.stream)
            return source, target, self._nbytes * (_PUTS - 1) / clock.ms

        return self._own((source, send), (target, receive))

    def _there_and_back(self, pair: Pair) -> _Ends:
        """Small bundles, each answered: milliseconds of one way."""
        there, back = self._small[pair], self._small[pair[::-1]]
        source, target = pair
        given, answered, far = self._end(there), self._end(back), self._far(*pair)
        data = {rank: self._data[rank][:4] for rank in pair if rank in self._data}
        clocks = {r: _Clock(self._places[r].device, far) for r in pair if self._mine(r)}

        def ask() -> None:
            for slot in range(_SLOTS):
                self._put(there, data[source], slot, clocks[source].stream)
                answered.get(source, slot, clocks[source].stream)
                answered.release(source, slot, clocks[source].stream)

        def answer() -> None:
            for slot in range(_SLOTS):
                given.get(target, slot, clocks[target].stream)
                given.release(target, slot, clocks[target].stream)
                self._put(back, data[target], slot, clocks[target].stream)

        def repeated(rank: int, work: Callable[[], None]) -> tuple[int, Callable[[], Any]]:
            if rank not in clocks:
                return rank, work
            clock, again = clocks[rank], clocks[rank].recorded(work)

            def run() -> tuple[int, int, float] | None:
                with clock:
                    again()  # until then one waits for the other to begin
                    clock.look()
                    for _ in range(_ROUNDS):
                        again()
                    clock.look()
                way = clock.ms / _ROUNDS / _SLOTS / 2
                return (source, target, way) if rank == source else None

            return rank, run

        return self._own(repeated(source, ask), repeated(target, answer))

    def _own(self, *works: tuple[int, Callable[[], Any]]) -> _Ends:
        return [work for rank, work in works if self._mine(rank)]


#: What this process does of an exchange: a thread for each.
_Ends = list[Callable[[], Any]]


class _Clock:
    """Times what a thread does (on the CPU, and with ``host``), or what it enqueues on ``stream``,
    one of its own: ``ms`` from the first look to the last."""

    def __init__(self, device: torch.device, host: bool = False) -> None:
        self._device, self._host = device, host or device.type != "cuda"
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if cuda else None
        self._looks: list[Any] = []
        self.ms = 0.0

    def look(self) -> None:
        """Now."""
        if self._host:
            self._looks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        self._looks.append(event)

    def recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does this work, on a GPU as a CUDA graph, as engines do: else launches would be what
        is timed."""
        if self._host:
            return work
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
        ):
            work()
        return graph.replay

    def __enter__(self) -> _Clock:
        self._context = contextlib.ExitStack()
        if self.stream is not None:
            self._context.enter_context(torch.cuda.device(self._device))
            self._context.enter_context(torch.cuda.stream(self.stream))
        return self

    def __exit__(self, failed: Any, *_: Any) -> None:
        self._context.close()
        if self.stream is not None:
            self.stream.synchronize()
        if failed is not None or len(self._looks) < 2:
            return
        first, last = self._looks[0], self._looks[-1]
        self.ms = (last - first) * 1e3 if self._host else first.elapsed_time(last)
        self.ms = max(self.ms, 1e-6)
