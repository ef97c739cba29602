"""CPU time of an eager put: what the thread that issues a denoiser's work loses to it."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence

import torch

from ..bench import Bench, figure
from ..cuda_world import CudaWorld
from ..figures import Figure
from ..links.link import Link
from ..payload import Payload, of_model, of_size
from ..program import Step, receive
from ..settings import Settings
from ..ways import Way
from .case import Case, needs_gpu

_SLOTS = 2


def _measure(bench: Bench, way: Way, payload: Payload) -> Iterator[Figure]:
    world = bench.world
    assert isinstance(world, CudaWorld)
    link = bench.link(way, 0, [1], payload, _SLOTS)
    # Few enough that the stream's queue takes them all while the gate is closed; of one tensor, of
    # which no way makes many operations, enough that the first, slower calls do not decide.
    operations = 480 if len(payload.specs) == 1 else 200
    count = max(4, operations // (len(payload.specs) + 3) // _SLOTS * _SLOTS)

    def receives(step: Step) -> None:
        for n in range(count):
            receive(step, link, n)

    def whole(step: Step) -> None:
        for n in range(count):
            step(0, link.send, n)
            receive(step, link, n)

    world.issue(whole)
    world.synchronize()
    times: list[float] = []
    while len(times) < bench.settings.rounds:
        seed = bench.refill([link])
        opened = torch.cuda.Event(enable_timing=True)
        world.gate.close(opened)
        seconds = _sends(world, link, count)
        held = world.gate.held(opened)
        world.issue(receives)
        held = world.everyone(held)
        world.synchronize()
        if held:
            times.append(world.gather(seconds)[0])
        else:
            world.gate.longer()
        bench.check([link], seed, count)
    us = [t / count * 1e6 for t in times]
    mode = getattr(link, "mode", None)
    yield figure("enqueue", way, "eager", payload, "put_cpu", us, mode=mode, calls=count)


def _sends(world: CudaWorld, link: Link, count: int) -> float:
    """Seconds that the calls take; 0 in processes without the sender."""
    if 0 not in world.local:
        return 0.0
    stream = world.stream(0)
    with world.on(stream):
        calls = [link.sending(n, stream) for n in range(count)]
        gc.disable()
        try:
            begun = time.perf_counter()
            for call in calls:
                call()
            return time.perf_counter() - begun
        finally:
            gc.enable()


def _payloads(settings: Settings) -> Sequence[Payload]:
    return [of_size(64 << 10), of_model("18x256K")]


CASE = Case(
    "enqueue", "CPU time of an eager put, the device held back", _payloads, _measure, needs_gpu
)
