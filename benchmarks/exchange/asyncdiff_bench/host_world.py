"""Ranks as threads of this process, over the host fabric. For tests and for a look: threads share
the cores, so the times say little."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar

import torch

import asyncdiff_core as core

from .machine import Machine
from .program import Program
from .world import Round

T = TypeVar("T")
_LANES = 2
_SECONDS = 30.0  # that a thread may wait for another


class HostWorld:
    """One thread for each lane of each rank."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.devices = [torch.device("cpu")] * len(machine.devices)
        self.local: Sequence[int] = range(len(machine.devices))
        self._fabric: core.Fabric | None = None
        self._threads = ThreadPoolExecutor(len(self.local) * _LANES)

    def fabric(self, ranks: int) -> core.Fabric:
        if self._fabric is None:
            self._fabric = core.HostFabric(len(self.devices))
        return self._fabric

    def launches(self) -> Sequence[str]:
        return ("threads",)

    def prepare(self, program: Program, launch: str, joint: bool) -> Round:
        def run() -> float:
            return self._run(program)

        run()
        return run

    def _run(self, program: Program) -> float:
        lanes = [(rank, lane) for rank in self.local for lane in range(_LANES)]
        start = Barrier(len(lanes))
        meet = {rank: Barrier(_LANES) for rank in self.local}

        def work(rank: int, lane: int) -> tuple[float, float]:
            try:
                start.wait(_SECONDS)
                begun = time.perf_counter()
                program(_ThreadStep(rank, lane, meet[rank]))
                return begun, time.perf_counter()
            except BaseException as error:
                for barrier in meet.values():
                    barrier.abort()
                if not isinstance(error, BrokenBarrierError):
                    self.fabric(rank + 1).abort(rank, f"{type(error).__name__}: {error}")
                raise

        futures = {x: self._threads.submit(work, *x) for x in lanes}
        _raise_first(futures.values())
        times = [f.result() for (rank, _), f in futures.items() if rank == 0]
        return max(t[1] for t in times) - min(t[0] for t in times)

    def synchronize(self) -> None:
        pass

    def gather(self, value: T) -> list[T]:
        return [value]

    def recover(self) -> None:
        self._fabric = None

    def close(self) -> None:
        self._threads.shutdown()


class _ThreadStep:
    """Does the steps of one lane of one rank."""

    def __init__(self, rank: int, lane: int, meet: Barrier) -> None:
        self._rank, self._lane, self._meet = rank, lane, meet

    def __call__(
        self, rank: int, operation: Callable[..., None], *args: Any, lane: int = 0
    ) -> None:
        if (rank, lane) == (self._rank, self._lane):
            operation(*args, None)

    def fork(self, rank: int) -> None:
        if rank == self._rank:
            self._meet.wait(_SECONDS)

    join = fork


def _raise_first(futures: Any) -> None:
    """What went wrong first; the others failed because of it."""
    errors = [f.exception() for f in _all(futures)]
    real = [e for e in errors if e is not None and not isinstance(e, BrokenBarrierError)]
    own = [e for e in real if not isinstance(e, core.Aborted)]
    for error in [*own, *real, *(e for e in errors if e is not None)]:
        raise error


def _all(futures: Any) -> list[Future[Any]]:
    return list(futures)
