"""What a process of the tests in {host,gpu}/test_core_processes.py does.

    python core_worker.py SCENARIO PROCESS PROCESSES FOLDER [OPTION ...]

Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np

import asyncdiff_core as core

LAYOUT = core.Layout([core.TensorSpec("float32", (257,)), core.TensorSpec("int64", (3,))])


def meet(folder: Path, process: int, processes: int) -> core.SocketRendezvous:
    return core.SocketRendezvous(
        str(folder / "meet"), process, processes, authkey=b"test", timeout=30
    )


def read(channel: core.Channel, receiver: int, slot: int) -> list[np.ndarray]:
    raw = np.asarray(channel.slot(receiver, slot))
    parts = zip(channel.layout.specs, channel.layout.offsets, strict=True)
    return [raw[o : o + s.nbytes].view(s.dtype) for s, o in parts]


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
    """Process 1 is killed in the middle; the others learn it within the deadline."""
    fabric = core.HostFabric(processes, deadline=1.0, rendezvous=meet(folder, process, processes))
    channel = fabric.channel(1, [r for r in range(processes) if r != 1], LAYOUT)
    if process == 1:
        channel.put([np.zeros(257, np.float32), np.zeros(3, np.int64)], 0)
        os.kill(os.getpid(), signal.SIGKILL)
    channel.get(process, 0)
    channel.release(process, 0)
    begun = time.monotonic()
    try:
        channel.get(process, 1)
    except core.ExchangeTimeout as e:
        waited = time.monotonic() - begun
        # What was there can be taken down, and a new fabric made without it.
        fabric.close()
        again = core.HostFabric(1)
        again.check()
        return {"peer": e.peer, "rank": e.rank, "seconds": waited}
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


def mismatch(process: int, processes: int, folder: Path) -> Any:
    """Processes that make different channels get an error, all of them."""
    fabric = core.HostFabric(processes, rendezvous=meet(folder, process, processes))
    try:
        fabric.channel(0, [1], LAYOUT, slots=2 + 100 * process)
    except core.CoreError as e:
        return str(e)
    return "no error"


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


def store(process: int, processes: int, folder: Path) -> Any:
    """The same over a torch.distributed store."""
    from torch.distributed import FileStore

    rendezvous = core.StoreRendezvous(
        FileStore(str(folder / "store"), processes), process, processes
    )
    fabric = core.HostFabric(processes, rendezvous=rendezvous)
    channel = fabric.channel(0, [1], LAYOUT)
    if process == 0:
        channel.put([np.full(257, 7, np.float32), np.zeros(3, np.int64)], 0)
        return 7.0
    channel.get(1, 0)
    return float(read(channel, 1, 0)[0][0])


class OnGpu:
    """This process's rank of a CUDA fabric with one rank a process; each sends to all others."""

    def __init__(
        self,
        process: int,
        processes: int,
        folder: Path,
        gpus: int,
        transport: str,
        deadline: float,
        mode: str = "auto",
    ) -> None:
        import torch

        self.process = process
        devices = [p % gpus for p in range(processes)]
        self.device = torch.device("cuda", devices[process])
        torch.cuda.set_device(self.device)
        self.meet = meet(folder, process, processes)
        self.fabric = core.CudaFabric(
            devices, deadline=deadline, transport=transport, rendezvous=self.meet
        )
        layout = core.Layout([core.TensorSpec("int64", (50_001,)), core.TensorSpec("int8", (7,))])
        everyone = range(processes)
        self.channels = [
            self.fabric.channel(
                s, [r for r in everyone if r != s], layout, name=f"from {s}", mode=mode
            )
            for s in everyone
        ]
        self.source = [
            torch.zeros(50_001, dtype=torch.int64, device=self.device),
            torch.ones(7, dtype=torch.int8, device=self.device),
        ]
        self.sending, self.receiving = torch.cuda.Stream(), torch.cuda.Stream()
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)
        self.wrong = torch.zeros_like(self.count)
        torch.cuda.synchronize()

    def send(self, slot: int) -> None:
        import torch

        with torch.cuda.stream(self.sending):
            self.source[0].add_(1)
            self.channels[self.process].put(self.source, slot, self.sending)

    def receive(self, slot: int) -> None:
        """Every bundle's numbers have to be how many came before it, plus one."""
        import torch

        with torch.cuda.stream(self.receiving):
            self.count.add_(1)
            for sender, channel in enumerate(self.channels):
                if sender == self.process:
                    continue
                channel.get(self.process, slot, self.receiving)
                raw = torch.as_tensor(channel.slot(self.process, slot), device=self.device)
                numbers = raw[: 50_001 * 8].view(torch.int64)
                self.wrong.add_((numbers != self.count).sum())
                channel.release(self.process, slot, self.receiving)


def cuda_exchange(
    process: int, processes: int, folder: Path, gpus: int, transport: str, mode: str
) -> Any:
    """Eager, then replayed CUDA graphs, then mixed."""
    import torch

    rank = OnGpu(process, processes, folder, gpus, transport, 20.0, mode)
    for n in range(20):
        rank.send(n % 2)
        rank.receive(n % 2)
    torch.cuda.synchronize()
    graphs = {}
    for slot in range(2):
        for work, arguments, stream in (
            (rank.send, (slot,), rank.sending),
            (rank.receive, (slot,), rank.receiving),
        ):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                work(*arguments)
            graphs[slot, stream is rank.sending] = graph
    rng = random.Random(process)
    for n in range(200):
        if rng.random() < 0.8:
            with torch.cuda.stream(rank.sending):
                graphs[n % 2, True].replay()
        else:
            rank.send(n % 2)
        if rng.random() < 0.8:
            with torch.cuda.stream(rank.receiving):
                graphs[n % 2, False].replay()
        else:
            rank.receive(n % 2)
        if n % 50 == 49:
            rank.fabric.check()
    torch.cuda.synchronize()
    rank.fabric.check()
    links = sorted({k for (a, b), k in rank.fabric.links().items() if a != b})
    result = {"count": rank.count.item(), "wrong": rank.wrong.item(), "links": links}
    rank.fabric.reset()
    rank.source[0].zero_()
    rank.count.zero_()
    torch.cuda.synchronize()
    rank.send(0)
    rank.receive(0)
    torch.cuda.synchronize()
    result["after_reset"] = rank.wrong.item()
    del graphs
    rank.fabric.close()
    return result


def cuda_killed(process: int, processes: int, folder: Path, gpus: int) -> Any:
    import torch

    rank = OnGpu(process, processes, folder, gpus, "auto", 1.0)
    rank.send(0)
    rank.receive(0)
    torch.cuda.synchronize()
    rank.fabric.check()
    rank.meet.all_gather(b"")
    if process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    rank.send(1)
    rank.receive(1)
    torch.cuda.synchronize()
    waited = time.monotonic() - begun
    try:
        rank.fabric.check()
    except core.ExchangeTimeout as e:
        rank.fabric.close()
        again = core.CudaFabric([rank.device.index] * 2)
        again.check()
        again.close()
        return {"peer": e.peer, "seconds": waited}
    return "no error"


def cuda_contexts(process: int, processes: int, folder: Path, transport: str) -> Any:
    """Which of the first two GPUs have a context after all that a fabric on the second does.

    Without torch, which makes contexts of its own. One process has both ranks.
    """
    import ctypes
    import threading

    owners = [0, processes - 1]
    if processes == 1:
        fabric = core.CudaFabric([1, 1], deadline=20.0, transport=transport)
    else:
        rendezvous = meet(folder, process, processes)
        fabric = core.CudaFabric([1, 1], deadline=20.0, transport=transport, rendezvous=rendezvous)
    layout = core.Layout([core.TensorSpec("uint8", (4096,))])
    channel, back = fabric.channel(0, [1], layout), fabric.channel(1, [0], layout)
    fabric.reset(5)
    for n in range(5, 9):
        if process == owners[0]:
            channel.put([back.slot(0, 0)], n % 2)
        if process == owners[1]:
            channel.get(1, n % 2)
            channel.release(1, n % 2)
    del channel, back
    # A thread that has never used CUDA frees it all.
    closing = threading.Thread(target=fabric.close)
    closing.start()
    closing.join()

    driver = ctypes.CDLL("libcuda.so.1")
    assert driver.cuInit(0) == 0
    context = ctypes.c_void_p()
    assert driver.cuCtxGetCurrent(ctypes.byref(context)) == 0
    assert context.value is None  # GPU 0 is the current one, as it was
    out = []
    for device in range(2):
        flags, active = ctypes.c_uint(), ctypes.c_int()
        code = driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
        assert code == 0
        out.append(bool(active.value))
    return out


class Cut:
    """A rendezvous that fails after so many gathers, in all processes at once."""

    def __init__(self, whole: core.SocketRendezvous, gathers: int) -> None:
        self.process, self.processes = whole.process, whole.processes
        self.whole = whole
        self.gathers = gathers

    def all_gather(self, mine: bytes) -> list[bytes]:
        if self.gathers == 0:
            raise ConnectionError("cut")
        self.gathers -= 1
        return self.whole.all_gather(mine)


def cuda_cut(process: int, processes: int, folder: Path, gpus: int) -> Any:
    """Making a fabric fails at every point of it where others may have memory of ours open; then a
    bundle goes through one that is whole. Returns how often it failed, and the bundle."""
    import torch

    devices = [p % gpus for p in range(processes)]
    whole = meet(folder, process, processes)
    for failed in range(50):
        rendezvous = Cut(whole, failed)
        try:
            fabric = core.CudaFabric(devices, deadline=20.0, rendezvous=rendezvous)
            break
        except ConnectionError:
            continue
    else:
        return "no fabric"
    rendezvous.gathers = 1000
    layout = core.Layout([core.TensorSpec("int64", (3,))])
    channel = fabric.channel(0, [1], layout, mode="kernel")
    tensor = torch.tensor([1, 2, 3], device=f"cuda:{devices[process]}")
    torch.cuda.synchronize(devices[process])
    if process == 0:
        channel.put([tensor], 0)
    if process == 1:
        tensor.zero_()
        torch.cuda.synchronize(devices[1])
        channel.unpack(1, [tensor], 0)
    torch.cuda.synchronize(devices[process])
    fabric.check()
    result = [failed, tensor.tolist()]
    fabric.close()
    return result


if __name__ == "__main__":
    scenario, process, processes, folder, *more = sys.argv[1:]
    options = [int(x) if x.isdigit() else x for x in more]
    print(json.dumps(globals()[scenario](int(process), int(processes), Path(folder), *options)))
