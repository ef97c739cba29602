"""What a process does of the tests of channels between GPUs of different hosts: one of two, which
count as on two hosts, with a rank each."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scenarios import main, meet

import asyncdiff_core as core

#: A bundle that no buffer of NCCL holds, and that goes in parts.
LARGE = [core.TensorSpec("float16", (30 << 20,))] * 2
SMALL = [core.TensorSpec("int32", (1000,))]


class Host:
    """A fabric of two ranks, of which this process has one."""

    def __init__(self, process: int, folder: Path, gpus: int, deadline: float = 20.0) -> None:
        self.process, self.gpus = process, gpus
        devices = [p % gpus for p in range(2)]
        self.device = torch.device("cuda", devices[process])
        torch.cuda.set_device(self.device)
        self.meet = meet(folder, process, 2)
        self.fabric = core.CudaFabric(devices, deadline=deadline, rendezvous=self.meet)

    def channels(self, specs: list[core.TensorSpec], slots: int = 2) -> list[core.Channel]:
        """One from each rank to the other."""
        layout = core.Layout(specs)
        return [self.fabric.channel(s, [1 - s], layout, slots=slots) for s in range(2)]

    def view(self, channel: core.Channel, slot: int) -> torch.Tensor:
        return torch.as_tensor(channel.slot(self.process, slot), device=self.device)

    def failure(self, work: Callable[[], object]) -> dict[str, Any]:
        """What came of it, as a fabric's check says, and after how many seconds."""
        begun = time.monotonic()
        try:
            work()
            torch.cuda.synchronize()
            until = time.monotonic() + 15
            while time.monotonic() < until:
                self.fabric.check()
                time.sleep(0.01)
        except core.CoreError as e:
            kind: str = type(e).__name__
            out: dict[str, Any] = {"kind": kind, "text": str(e), **vars(e)}
        else:
            out = {"kind": ""}
        out["seconds"] = time.monotonic() - begun
        return out

    def again(self, folder: Path) -> list[int]:
        """Closes what has failed, and sends a bundle in a new fabric."""
        self.fabric.close()
        after = folder / "again"
        after.mkdir(exist_ok=True)
        host = Host(self.process, after, self.gpus)
        channels = host.channels(SMALL)
        sent = torch.arange(1000, dtype=torch.int32, device=self.device) + self.process
        torch.cuda.synchronize()
        channels[self.process].put([sent], 0)
        channels[1 - self.process].get(self.process, 0)
        torch.cuda.synchronize()
        host.fabric.check()
        got: list[int] = host.view(channels[1 - self.process], 0).view(torch.int32)[:2].tolist()
        host.fabric.close()
        return got


def values(spec: core.TensorSpec, seed: int, device: torch.device) -> torch.Tensor:
    """Bytes that no other seed has."""
    generator = torch.Generator(device).manual_seed(seed)
    raw = torch.randint(
        0, 256, (spec.nbytes,), dtype=torch.uint8, device=device, generator=generator
    )
    return raw.view(getattr(torch, spec.dtype)).view(spec.shape)


def nccl_sizes(process: int, processes: int, folder: Path, gpus: int) -> Any:
    """Bundles of all sizes in both directions at once, over more of them than there are slots.
    Everybody sends before anybody asks, and waits for its device in between."""
    host = Host(process, folder, gpus)
    spec = core.TensorSpec
    bundles = [
        [spec("uint8", (1,))],
        [spec("float16", (3, 5, 7)), spec("float16", (0,)), spec("float16", (1,))],
        [spec("float16", (n + 1,)) for n in range(40)],
        [spec("int64", (n,)) for n in range(330)],  # more than one launch takes
        [spec("float16", (2, 320, 96, 96)), spec("int8", (4097,)), spec("float16", (5 << 20,))],
        LARGE,
    ]
    wrong = []
    for which, specs in enumerate(bundles):
        slots = which % 3 + 1
        channels = host.channels(specs, slots)
        mine, theirs = channels[process], channels[1 - process]
        for n in range(6):
            sent = [values(s, 1000 * n + 2 * i + process, host.device) for i, s in enumerate(specs)]
            torch.cuda.synchronize()
            mine.put(sent, n % slots)
            torch.cuda.synchronize()
            theirs.get(process, n % slots)
            torch.cuda.synchronize()
            got = host.view(theirs, n % slots)
            for i, s in enumerate(specs):
                expected = values(s, 1000 * n + 2 * i + 1 - process, host.device)
                at = theirs.layout.offsets[i]
                there = got[at : at + s.nbytes]
                if not torch.equal(there, expected.flatten().view(torch.uint8)):
                    wrong.append([which, n, i])
            theirs.release(process, n % slots)
        host.fabric.check()
        for channel in channels:
            torch.cuda.synchronize()
            channel.close()
    links = host.fabric.links()
    host.fabric.close()
    return {"wrong": wrong, "links": [links[0, 1], links[1, 0]]}


def nccl_crossing(process: int, processes: int, folder: Path, gpus: int, mega: str) -> Any:
    """One graph on one stream that first sends and then receives so many MiB, in both processes."""
    host = Host(process, folder, gpus)
    specs = [core.TensorSpec("float16", (int(mega) << 18,))] * 2
    channels = host.channels(specs, 1)
    mine, theirs = channels[process], channels[1 - process]
    count = torch.zeros((), dtype=torch.float16, device=host.device)
    source = torch.zeros(specs[0].shape, dtype=torch.float16, device=host.device)
    wrong = torch.zeros((), dtype=torch.int64, device=host.device)
    stream = torch.cuda.Stream()

    def tick() -> None:
        count.add_(1)
        source.fill_(1).mul_(count)
        mine.begin(0, stream)
        mine.push(0, source, 0, stream)
        mine.push(1, source, 0, stream)
        mine.commit(0, stream)
        theirs.get(process, 0, stream)
        got = host.view(theirs, 0).view(torch.float16)[: 2 * source.numel()]
        wrong.add_((got != count).sum())
        theirs.release(process, 0, stream)

    # All that follows a get runs once before the first one: to load a kernel, or to allocate, the
    # host waits for those that run, and nobody launches meanwhile what this one waits for.
    for _ in range(2):
        wrong.add_((host.view(theirs, 0).view(torch.float16)[: 2 * source.numel()] != count).sum())
    wrong.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        tick()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            tick()
        for n in range(60):
            graph.replay()
            if n % 20 == 19:
                stream.synchronize()
                host.fabric.check()
    torch.cuda.synchronize()
    host.fabric.check()
    result = [wrong.item(), count.item()]
    del graph
    host.fabric.close()
    return result


def nccl_pressure(process: int, processes: int, folder: Path, gpus: int) -> Any:
    """A sender that is faster than its receiver. Who waits for its device waits for no bundle that
    is not asked for; what is not read is dropped by a reset."""
    host = Host(process, folder, gpus)
    channel = host.channels(SMALL)[0]
    fabric, device = host.fabric, host.device
    numbers = [torch.full((1000,), n, dtype=torch.int32, device=device) for n in range(6)]
    torch.cuda.synchronize()
    out: dict[str, Any] = {}
    for first in (0, 7):
        fabric.reset(first)
        stream = torch.cuda.Stream()
        if process == 0:
            for n in range(2):
                channel.put([numbers[n]], (first + n) % 2, stream)
            torch.cuda.synchronize()
        fabric.all_gather(b"")
        torch.cuda.synchronize()
        if process == 0:
            for n in range(2, 4):
                channel.put([numbers[n]], (first + n) % 2, stream)
            done = stream.record_event()
            time.sleep(0.5)
            out[f"waited from {first}"] = not done.query()
        fabric.all_gather(b"")
        if process == 1:
            got = []
            for n in range(4):
                slot = (first + n) % 2
                channel.get(1, slot, stream)
                stream.synchronize()
                got.append(host.view(channel, slot).view(torch.int32)[:1000].unique().tolist())
                # The last two are left in their slots.
                if n < 2:
                    channel.release(1, slot, stream)
            out[f"got from {first}"] = got
        torch.cuda.synchronize()
        fabric.all_gather(b"")
        fabric.check()
    fabric.close()
    return out


def nccl_order(process: int, processes: int, folder: Path, gpus: int, what: str) -> Any:
    """A call out of turn, eagerly or in a graph; what both say, and that it goes on anew."""
    host = Host(process, folder, gpus)
    channel = host.channels(SMALL)[0]
    source = torch.ones(1000, dtype=torch.int32, device=host.device)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    calls: dict[str, tuple[int, Callable[[], None]]] = {
        "put": (0, lambda: channel.put([source], 1, stream)),
        "push": (0, lambda: channel.push(0, source, 0, stream)),
        "commit": (0, lambda: channel.commit(0, stream)),
        "get": (1, lambda: channel.get(1, 1, stream)),
        "release": (1, lambda: channel.release(1, 0, stream)),
    }
    name, _, graphed = what.partition("-")
    who, call = calls[name]

    def work() -> None:
        if process != who:
            return
        if not graphed:
            call()
            return
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            call()
        with torch.cuda.stream(stream):
            graph.replay()
        torch.cuda.synchronize()

    out = host.failure(work)
    out["again"] = host.again(folder)
    return out


def nccl_silent(process: int, processes: int, folder: Path, gpus: int) -> Any:
    """Rank 1 waits for a bundle that rank 0 never sends."""
    host = Host(process, folder, gpus, 2.0)
    channel = host.channels(SMALL)[0]
    out = host.failure(lambda: channel.get(1, 0) if process == 1 else None)
    out["again"] = host.again(folder)
    return out


def nccl_abort(process: int, processes: int, folder: Path, gpus: int) -> Any:
    """Another thread aborts while rank 1 waits."""
    host = Host(process, folder, gpus, 60.0)
    channel = host.channels(SMALL)[0]

    def work() -> None:
        if process == 1:
            threading.Timer(0.5, lambda: host.fabric.abort(1, "enough")).start()
            channel.get(1, 0)

    out = host.failure(work)
    out["again"] = host.again(folder)
    return out


def nccl_traffic(process: int, processes: int, folder: Path, gpus: int, kills: int) -> Any:
    """Both send and receive until one is killed, at a random moment."""
    host = Host(process, folder, gpus)
    channels = host.channels(LARGE)
    mine, theirs = channels[process], channels[1 - process]
    source = torch.ones(LARGE[0].shape, dtype=torch.float16, device=host.device)
    torch.cuda.synchronize()
    host.meet.all_gather(b"")
    if process == 1:
        delay = random.Random(kills).uniform(0.0, 0.5)
        threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()

    def work() -> None:
        for n in range(1_000_000):
            mine.put([source, source], n % 2)
            theirs.get(process, n % 2)
            theirs.release(process, n % 2)
            torch.cuda.synchronize()
            host.fabric.check()

    out = host.failure(work)
    begun = time.monotonic()
    host.fabric.close()
    out["closing"] = time.monotonic() - begun
    return out


if __name__ == "__main__":
    main(globals())
