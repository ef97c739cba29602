"""How fast bundles travel to a rank of another process, on the same host or another."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator

import torch

import asyncdiff_core as core

from ...processes.team import Team
from ..devices import Place, fabric

#: Bytes of a bundle on one host, and to another one, where it may take a while; how many are sent.
_NEAR, _FAR, _PUTS = 1 << 26, 1 << 22, 6


def between_processes(first: Place, other: Place, team: Team) -> float:
    """Bytes a millisecond from one place to another, of another process, through a channel
    (median). Collective."""
    link = fabric([first, other], None, team)
    nbytes = _NEAR if first.host == other.host else _FAR
    layout = core.Layout([core.TensorSpec("uint8", (nbytes,))])
    with team.collective():
        # Of one slot: every put waits until the bundle before it was received.
        channel = link.channel(0, [1], layout, slots=1, name="a link", mode="copy")

    def receive() -> None:
        with _stream_of(other.device) as stream:
            for _ in range(_PUTS):
                channel.get(1, 0, stream)
                channel.release(1, 0, stream)

    def send() -> float:
        data = torch.zeros(nbytes, dtype=torch.uint8, device=first.device)
        with _stream_of(first.device) as stream:
            ms = [_timed(lambda: channel.put([data], 0, stream), stream) for _ in range(_PUTS)]
        return nbytes / statistics.median(ms[1:])

    works = {first.process: send, other.process: receive}
    try:
        found = team.together("measure links", works.get(team.process, lambda: None))
        link.check()
    finally:
        with team.collective():
            link.close()
    speed: float = found[first.process]
    return speed


def _timed(work: Callable[[], None], stream: torch.cuda.Stream | None) -> float:
    """Milliseconds of what ``work`` does, or enqueues."""
    if stream is None:
        begun = time.perf_counter()
        work()
        return (time.perf_counter() - begun) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record(stream)
    work()
    last.record(stream)
    last.synchronize()
    return first.elapsed_time(last)


@contextlib.contextmanager
def _stream_of(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """A stream of a GPU, the current one meanwhile, whose work is done afterwards."""
    if device.type == "cpu":
        yield None
        return
    torch.cuda.synchronize(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield stream
    stream.synchronize()
