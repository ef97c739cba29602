"""Ranks on GPUs: all in this process, or one in each of several."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

import asyncdiff_core as core
from asyncdiff_core import Rendezvous

from .gate import Gate
from .machine import Machine
from .program import Program
from .world import Round

T = TypeVar("T")
_LANES = 2
_DEADLINE = 5.0  # seconds; longer than a gate is ever closed


class CudaWorld:
    """Two streams a rank. ``launch`` "eager" enqueues a program's operations one by one behind the
    gate; "graph" replays it as a CUDA graph, one a rank (or one for all, if joint)."""

    def __init__(
        self,
        machine: Machine,
        local: Sequence[int] | None = None,
        rendezvous: Rendezvous | None = None,
    ) -> None:
        self.machine = machine
        self.devices = [torch.device(d) for d in machine.devices]
        self.local: Sequence[int] = range(len(self.devices)) if local is None else local
        self._rendezvous = rendezvous
        self._fabrics: dict[int, core.Fabric] = {}
        self._groups: dict[tuple[int, ...], Any] = {}
        self._streams = {
            (r, lane): torch.cuda.Stream(self.devices[r])
            for lane in range(_LANES)
            for r in self.local
        }
        self.gate = Gate(self._streams.get((0, 0)))

    def fabric(self, ranks: int) -> core.Fabric:
        if self._rendezvous is not None:
            ranks = len(self.devices)  # all processes make it together
        # One of its own for each number of ranks: those that share a GPU are launched otherwise.
        if ranks not in self._fabrics:
            devices = [d.index for d in self.devices[:ranks]]
            self._fabrics[ranks] = core.CudaFabric(
                devices, deadline=_DEADLINE, rendezvous=self._rendezvous
            )
        return self._fabrics[ranks]

    def launches(self) -> Sequence[str]:
        return ("graph", "eager")

    def group(self, ranks: Sequence[int]) -> Any:
        """The torch.distributed group of these ranks, one for each set of them."""
        import torch.distributed as dist

        members = tuple(sorted(ranks))
        if len(members) == dist.get_world_size():
            return dist.group.WORLD
        if members not in self._groups:
            self._groups[members] = dist.new_group(list(members))
        return self._groups[members]

    def stream(self, rank: int, lane: int = 0) -> torch.cuda.Stream:
        """A stream of a rank of this process."""
        return self._streams[rank, lane]

    def issue(self, program: Program, only: int | None = None) -> None:
        """Enqueue a program, or one rank's part of it, now."""
        program(_StreamStep(self, self.local if only is None else [only]))

    def gated(self, body: Callable[[], None]) -> float:
        """Seconds of rank 0 for what ``body`` enqueues; see :class:`Gate`."""
        return self.gather(self.gate.round(body, self.everyone, self.synchronize))[0]

    def prepare(self, program: Program, launch: str, joint: bool) -> Round:
        # Whatever is loaded, allocated or connected when it is used first, is so from here on:
        # behind kernels that wait that could wait for ever.
        self.issue(program)
        self.synchronize()
        if launch == "eager":
            return lambda: self.gated(lambda: self.issue(program))
        graphs = self._capture(program, joint)

        def replay() -> None:
            for rank, graph in graphs:
                with self.on(self.stream(rank)):
                    graph.replay()

        return lambda: self.gated(replay)

    def _capture(self, program: Program, joint: bool) -> list[tuple[int, torch.cuda.CUDAGraph]]:
        census = _Census()
        program(census)
        ranks = sorted(census.ranks.intersection(self.local))
        if joint:
            return [(0, self._graph(0, lambda: self._in_one_graph(program, ranks)))]
        return [
            (rank, self._graph(rank, lambda rank=rank: self.issue(program, only=rank)))  # type: ignore[misc]
            for rank in ranks
        ]

    def _graph(self, rank: int, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        # Not torch.cuda.graph: it collects garbage and empties caches each time. Other threads
        # (NCCL's watchdog) may go on meanwhile.
        graph = torch.cuda.CUDAGraph()
        with self.on(self.stream(rank)):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                body()
            except BaseException:
                with suppress(RuntimeError):  # what went wrong is known already
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph

    def _in_one_graph(self, program: Program, ranks: Sequence[int]) -> None:
        origin = self.stream(0)
        others = [self.stream(r, lane) for r in ranks for lane in range(_LANES)]
        others.remove(origin)
        begun = torch.cuda.Event()
        begun.record(origin)
        for stream in others:
            stream.wait_event(begun)
        self.issue(program)
        for stream in others:
            origin.wait_stream(stream)

    @contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Make a stream and its device the current ones."""
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            yield

    def synchronize(self) -> None:
        for rank in self.local:
            torch.cuda.synchronize(self.devices[rank])
        for fabric in self._fabrics.values():
            fabric.check()
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        if self._rendezvous is None:
            return [value]
        return [json.loads(x) for x in self._rendezvous.all_gather(json.dumps(value).encode())]

    def everyone(self, holds: bool) -> bool:
        """Whether it holds in all processes."""
        return all(self.gather(holds))

    def recover(self) -> None:
        for rank in self.local:
            torch.cuda.synchronize(self.devices[rank])
        self._fabrics.clear()

    def close(self) -> None:
        self.recover()


class _StreamStep:
    """Enqueues the steps of the given ranks."""

    def __init__(self, world: CudaWorld, ranks: Sequence[int]) -> None:
        self._world, self._ranks = world, ranks

    def __call__(
        self, rank: int, operation: Callable[..., None], *args: Any, lane: int = 0
    ) -> None:
        if rank in self._ranks:
            stream = self._world.stream(rank, lane)
            with self._world.on(stream):
                operation(*args, stream)

    def fork(self, rank: int) -> None:
        if rank in self._ranks:
            self._world.stream(rank, 1).wait_stream(self._world.stream(rank))

    def join(self, rank: int) -> None:
        if rank in self._ranks:
            self._world.stream(rank).wait_stream(self._world.stream(rank, 1))


class _Census:
    """Notes which ranks a program has work for."""

    def __init__(self) -> None:
        self.ranks: set[int] = set()

    def __call__(
        self, rank: int, operation: Callable[..., None], *args: Any, lane: int = 0
    ) -> None:
        self.ranks.add(rank)

    def fork(self, rank: int) -> None:
        pass

    join = fork
