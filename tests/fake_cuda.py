"""Streams, events and graphs that do everything at once, on the CPU.

Only enough of torch.cuda to run the benchmark's code for GPUs where there is none: which steps it
issues, in which order, what it captures and replays, and what it makes of the times. What a device
would do, it does not show.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

import asyncdiff_core as core

CPU = torch.device("cpu")


class Event:
    """A time. It never says that it has happened, so that gates hold."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time: float | None = None

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return False

    def elapsed_time(self, other: Event) -> float:
        assert self.time is not None and other.time is not None
        return max(other.time - self.time, 1e-6) * 1e3


class Stream:
    cuda_stream = 0

    def __init__(self, device: Any = None) -> None:
        self.device = CPU

    def wait_event(self, event: Event) -> None:
        # Waiting for what was never recorded waits for nothing, on a GPU: a mistake in a program.
        assert event.time is not None, "a wait for an event that is recorded later"

    def wait_stream(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Graph:
    """Notes what a program issues while it is captured, through :func:`install`."""

    capturing: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def capture_begin(self, capture_error_mode: str) -> None:
        assert Graph.capturing is None
        Graph.capturing = self

    def capture_end(self) -> None:
        Graph.capturing = None

    def replay(self) -> None:
        # On the host waits block, so graphs that wait for each other need a thread each.
        running.append(threads.submit(lambda: [call() for call in self.calls]))


threads = ThreadPoolExecutor(8)
running: list[Future[Any]] = []


def synchronize(device: Any = None) -> None:
    while running:
        running.pop().result()


@contextlib.contextmanager
def _here(*args: Any) -> Iterator[None]:
    yield


def memmove(target: int, source: int, nbytes: int, stream: int) -> None:
    ctypes.memmove(target, source, nbytes)


def install(patch: Any) -> None:
    """Replace parts of torch.cuda, and of the benchmark, by a pytest.MonkeyPatch."""
    from asyncdiff_bench import cuda_world
    from asyncdiff_bench.links import memcpy

    patch.setattr(core, "CudaFabric", lambda devices, **options: core.HostFabric(len(devices)))
    patch.setattr(memcpy, "_memcpy", lambda: memmove)

    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "device": _here,
        "stream": _here,
        "set_device": _here,
        "synchronize": synchronize,
        "_sleep": lambda _: None,
    }.items():
        patch.setattr(torch.cuda, name, value)

    issue = cuda_world._StreamStep.__call__

    def step(self: Any, rank: int, operation: Any, *args: Any, lane: int = 0) -> None:
        def call() -> None:
            issue(self, rank, operation, *args, lane=lane)

        if Graph.capturing is not None:
            Graph.capturing.calls.append(call)
        else:
            call()

    patch.setattr(cuda_world._StreamStep, "__call__", step)
