"""What a process of the tests of channels between processes does."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import signal
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from core_bundles import read
from scenarios import main, meet

import asyncdiff_core as core

LAYOUT = core.Layout([core.TensorSpec("float32", (257,)), core.TensorSpec("int64", (3,))])


def exchange(process: int, processes: int, folder: Path) -> Any:
    """Every rank sends to all others, with random delays; payloads carry a checksum."""
    fabric = core.HostFabric(processes, rendezvous=meet(folder, process, processes))
    channels = []
    for sender in range(processes):
        receivers = [r for r in range(processes) if r != sender]
        channels.append(fabric.channel(sender, receivers, LAYOUT, slots=2))
    rng = random.Random(process)
    received = 0
    for generation in range(2):
        for n in range(300):
            payload = np.random.default_rng([process, n]).random(257, np.float32)
            tail = np.array([process, n, zlib.crc32(payload)], np.int64)
            channels[process].put([payload, tail], n % 2)
            for sender, channel in enumerate(channels):
                if sender == process:
                    continue
                channel.get(process, n % 2)
                got, mark = read(channel, process, n % 2)
                assert mark.tolist() == [sender, n, zlib.crc32(got)], (sender, n, mark)
                channel.release(process, n % 2)
                received += 1
            if rng.random() < 0.02:
                time.sleep(rng.random() * 1e-3)
        if generation == 0:
            fabric.reset()
    fabric.check()
    return received


def killed(process: int, processes: int, folder: Path) -> Any:
    """Process 1 is killed in the middle; the others learn it at once."""
    fabric = core.HostFabric(processes, deadline=20.0, rendezvous=meet(folder, process, processes))
    channel = fabric.channel(1, [r for r in range(processes) if r != 1], LAYOUT)
    if process == 1:
        channel.put([np.zeros(257, np.float32), np.zeros(3, np.int64)], 0)
        fabric.all_gather(b"")
        os.kill(os.getpid(), signal.SIGKILL)
    channel.get(process, 0)
    channel.release(process, 0)
    fabric.all_gather(b"")  # a death ends everything, also what could still be read
    begun = time.monotonic()
    try:
        channel.get(process, 1)
    except core.ProcessLost as e:
        waited = time.monotonic() - begun
        # What was there can be taken down, and a new fabric made without it.
        fabric.close()
        again = core.HostFabric(1)
        again.check()
        return {"process": e.process, "ranks": e.ranks, "seconds": waited}
    return "no error"


def abort(process: int, processes: int, folder: Path) -> Any:
    fabric = core.HostFabric(processes, deadline=60, rendezvous=meet(folder, process, processes))
    channel = fabric.channel(0, list(range(1, processes)), LAYOUT)
    if process == 0:
        time.sleep(0.2)
        fabric.abort(0, "enough of this")
    try:
        if process == 0:
            fabric.check()
        else:
            channel.get(process, 0)
    except core.Aborted as e:
        return {"rank": e.rank, "text": str(e)}
    return "no error"


def mismatch(process: int, processes: int, folder: Path, gpus: int = 0) -> Any:
    """Processes that make different calls get an error, all of them, and can go on."""
    meeting = meet(folder, process, processes)
    fabric: core.Fabric
    if gpus:
        fabric = core.CudaFabric([p % gpus for p in range(processes)], rendezvous=meeting)
    else:
        fabric = core.HostFabric(processes, rendezvous=meeting)
    one = process == 1
    half = core.Layout([core.TensorSpec("bfloat16" if one else "float16", (8,))])
    others = list(range(1, processes))
    calls: dict[str, Callable[[], Any]] = {
        "slots": lambda: fabric.channel(0, others, LAYOUT, slots=2 + 100 * process),
        "dtype": lambda: fabric.channel(0, others, half),
        "order": lambda: fabric.channel(0, others, half, name="last" if one else "first"),
        "reset": lambda: fabric.reset(7 if one else 6),
        "call": lambda: fabric.reset() if one else fabric.channel(0, others, LAYOUT),
        "rank": lambda: fabric.channel(0, [99], LAYOUT),
    }
    texts = {}
    for name, call in calls.items():
        try:
            call()
        except core.CoreError as e:
            texts[name] = str(e)
    channel = fabric.channel(0, [1], LAYOUT, mode="copy")
    data: list[Any] = [np.zeros(257, np.float32), np.zeros(3, np.int64)]
    if gpus:
        import torch

        data = [torch.as_tensor(x, device=f"cuda:{process % gpus}") for x in data]
    if process == 0:
        channel.put(data, 0)
    if one:
        channel.get(1, 0)
    if gpus:
        torch.cuda.synchronize(process % gpus)
    fabric.check()
    fabric.close()
    return texts


def ends(process: int, processes: int, folder: Path) -> Any:
    """Channels between two of three processes, which the third knows nothing of."""
    fabric = core.HostFabric(processes, rendezvous=meet(folder, process, processes))
    data: list[Any] = [np.full(257, process, np.float32), np.arange(3)]
    received = []
    if process < 2:
        for slots in range(1, 30):
            channel = fabric.channel(0, [1], LAYOUT, slots=slots)
            if process == 0:
                channel.put(data, 0)
            else:
                channel.get(1, 0)
                received.append(float(read(channel, 1, 0)[0].sum()))
            channel.close()
    else:
        channel = fabric.channel(0, [1], LAYOUT)  # returns at once: an end that is not here
        try:
            channel.slot(1, 0)
        except core.InvalidArgument as e:
            received.append(str(e))
    everybody = fabric.all_gather(bytes([process]) * 5000)
    return {"received": received, "all": [part[0] for part in everybody]}


def churn(process: int, processes: int, folder: Path, changes: int) -> Any:
    """Many changes of shape: what a process holds afterwards, and what it held early on."""

    def held() -> list[int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        return [pages * 4096, maps, len(os.listdir("/proc/self/fd"))]

    fabric = core.HostFabric(processes, rendezvous=meet(folder, process, processes))
    early: list[int] = []
    for n in range(changes):
        layout = core.Layout([core.TensorSpec("float32", (1 + n % 500,))])
        channel = fabric.channel(0, list(range(1, processes)), layout, slots=1 + n % 3)
        payload = np.full(1 + n % 500, n, np.float32)
        if process == 0:
            channel.put([payload], 0)
        else:
            channel.get(process, 0)
            assert read(channel, process, 0)[0][0] == n
        if n % 2 == 0:
            channel.close()
        del channel
        if n == changes // 10:
            gc.collect()
            early = held()
    gc.collect()
    fabric.all_gather(b"")
    return early, held()


def chain(process: int, processes: int, folder: Path, how: str) -> Any:
    """0 sends to 1, 1 to 2, 2 to 3; process 0 is not there any more."""
    fabric = core.HostFabric(processes, deadline=3.0, rendezvous=meet(folder, process, processes))
    channels = [fabric.channel(p, [p + 1], LAYOUT) for p in range(processes - 1)]
    fabric.all_gather(b"")
    if process == 0:
        time.sleep(0.5)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "closed":
            fabric.close()
            time.sleep(2)
        if how == "slow":
            time.sleep(5)
        return "gone"
    begun = time.monotonic()
    try:
        channels[process - 1].get(process, 0)
    except core.ProcessLost as e:
        return {"process": e.process, "ranks": e.ranks, "s": time.monotonic() - begun, "e": str(e)}
    except core.ExchangeTimeout as e:
        return {"peer": e.peer, "straggler": e.straggler, "e": str(e)}
    return "no error"


def collective(process: int, processes: int, folder: Path, how: str) -> Any:
    """Process 1 is not there when the others make a channel; they go on without it."""
    fabric = core.HostFabric(processes, deadline=2.0, rendezvous=meet(folder, process, processes))
    if process == 1:
        time.sleep(0.3)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            return "exited"
        time.sleep(4)
    begun = time.monotonic()
    out: dict[str, Any] = {}
    try:
        fabric.channel(0, list(range(1, processes)), LAYOUT)
    except (core.ProcessLost, core.CollectiveTimeout) as e:
        out = {"error": type(e).__name__, "process": e.process, "ranks": e.ranks, "e": str(e)}
    out["seconds"] = time.monotonic() - begun
    fabric.close()
    if process != 1:
        left = [p for p in range(processes) if p != 1]
        (folder / "again").mkdir(exist_ok=True)
        again = core.HostFabric(
            len(left), rendezvous=meet(folder / "again", left.index(process), len(left))
        )
        out["again"] = len(again.all_gather(b""))
        again.close()
    return out


def forked(process: int, processes: int, folder: Path) -> Any:
    """A child that was forked does nothing in its parent's name."""
    fabric = core.HostFabric(processes, deadline=5.0, rendezvous=meet(folder, process, processes))
    channel = fabric.channel(0, [1], LAYOUT)
    data: list[Any] = [np.full(257, 7, np.float32), np.arange(3)]
    texts = []
    if process == 0:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            said = []
            calls = (
                lambda: channel.put([np.zeros(257, np.float32), np.arange(3)], 0),
                lambda: fabric.abort(0, "not me"),
                fabric.reset,
                lambda: fabric.channel(0, [1], LAYOUT),
            )
            for call in calls:
                try:
                    call()
                except core.CoreError as e:
                    said.append(str(e))
            fabric.close()
            del channel, fabric, calls, call
            gc.collect()
            os.write(writing, "|".join(said).encode())
            os._exit(0)
        os.waitpid(child, 0)
        texts = os.read(reading, 10000).decode().split("|")
        channel.put(data, 0)
    else:
        channel.get(1, 0)
        assert read(channel, 1, 0)[0][0] == 7
    fabric.all_gather(b"")
    fabric.check()
    return texts


def no_memory(process: int, processes: int, folder: Path) -> Any:
    """Process 1 has no memory for its mailbox; a channel that it has some for is made after it."""
    fabric = core.HostFabric(processes, deadline=5.0, rendezvous=meet(folder, process, processes))
    large = core.Layout([core.TensorSpec("uint8", (1 << 28,))])
    others = list(range(1, processes))
    if process == 1:  # a thread's first allocation takes 128 MiB of addresses
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (200 << 20), resource.RLIM_INFINITY))
    try:
        fabric.channel(0, others, large, slots=1)
        error = "none"
    except (core.CoreError, MemoryError) as e:
        error = str(e)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    channel = fabric.channel(0, others, LAYOUT)
    if process == 0:
        channel.put([np.zeros(257, np.float32), np.arange(3)], 0)
    else:
        channel.get(process, 0)
    fabric.all_gather(b"")
    return error


def foreign(process: int, processes: int, folder: Path) -> Any:
    """The ends of other processes' ranks are refused; two ranks in one process are fine."""
    owners = [0, 0, 1]
    fabric = core.HostFabric(3, owners=owners, rendezvous=meet(folder, process, processes))
    inside = fabric.channel(0, [1], LAYOUT)
    across = fabric.channel(1, [2], LAYOUT)
    data = [np.ones(257, np.float32), np.arange(3)]
    if process == 0:
        inside.put(data, 0)
        inside.get(1, 0)
        across.put(read(inside, 1, 0), 0)
        inside.release(1, 0)
    else:
        across.get(2, 0)
        assert read(across, 2, 0)[0].sum() == 257
    try:
        across.get(2, 1) if process == 0 else across.begin(1)
    except core.InvalidArgument as e:
        return str(e)
    return "no error"


def stopped(process: int, processes: int, folder: Path, deadline: int) -> Any:
    """The last process is stopped; the others would wait for its work for a minute."""
    fabric = core.HostFabric(
        processes, deadline=deadline, rendezvous=meet(folder, process, processes)
    )
    pids = fabric.all_gather(str(os.getpid()).encode())
    if process == processes - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    begun = time.monotonic()
    try:
        fabric.all_gather(b"", timeout=60)
    except core.CollectiveTimeout as e:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pids[-1]), signal.SIGKILL)
        return e.process, str(e), time.monotonic() - begun
    raise AssertionError("it came")


def linked(process: int, processes: int, folder: Path) -> Any:
    """Two processes send to each other at the same time, over a link that both directions share:
    seconds until both bundles were there."""
    meeting = meet(folder, process, processes)
    fabric = core.HostFabric(2, rendezvous=meeting, link="100MB/s,2ms,both")
    layout = core.Layout([core.TensorSpec("uint8", (1 << 20,))])
    channels = [fabric.channel(r, [1 - r], layout) for r in range(2)]
    fabric.all_gather(b"")
    begun = time.perf_counter()
    channels[process].put([np.zeros(1 << 20, np.uint8)], 0)
    channels[1 - process].get(process, 0)
    fabric.all_gather(b"")
    return time.perf_counter() - begun, fabric.simulated_link


def links_differ(process: int, processes: int, folder: Path) -> Any:
    """One process simulates a link, and the other does not."""
    return _refused(folder, process, processes, "1GB/s,1us" if process else "off")


def link_between_hosts(process: int, processes: int, folder: Path) -> Any:
    """Both simulate one, on two hosts."""
    return _refused(folder, process, processes, "1GB/s,1us")


def _refused(folder: Path, process: int, processes: int, link: str) -> str:
    try:
        core.HostFabric(2, rendezvous=meet(folder, process, processes), link=link)
    except core.InvalidArgument as e:
        return str(e)
    return "it was made"


if __name__ == "__main__":
    main(globals())
