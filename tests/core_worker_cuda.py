"""What a process of the tests of channels between GPUs of several processes does."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from scenarios import main, meet

import asyncdiff_core as core


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
        # What follows a get is loaded before the first one: the host may have to wait for that.
        self.wrong.add_((torch.zeros_like(self.source[0]) != self.count).sum())
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

    rank = OnGpu(process, processes, folder, gpus, "auto", 20.0)
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
    except core.ProcessLost as e:
        rank.fabric.close()
        again = core.CudaFabric([rank.device.index] * 2)
        again.check()
        again.close()
        return {"process": e.process, "ranks": e.ranks, "seconds": waited}
    return "no error"


def cuda_churn(process: int, processes: int, folder: Path, gpus: int, changes: int) -> Any:
    """Many changes of shape: the memory of this GPU that is taken afterwards, and was early on.
    Channels of processes 0 and 1, which the others do not make, and of all."""
    import torch

    devices = [p % gpus for p in range(processes)]
    device = torch.device("cuda", devices[process])
    torch.cuda.set_device(device)
    fabric = core.CudaFabric(devices, deadline=20.0, rendezvous=meet(folder, process, processes))
    modes = ("copy", "kernel", "inline")

    def taken() -> int:
        # All processes are at the same point: nobody allocates or frees meanwhile.
        fabric.all_gather(b"")
        free, total = torch.cuda.mem_get_info(device)
        fabric.all_gather(b"")
        return total - free

    early = 0
    source = torch.arange(1 << 20, dtype=torch.int32, device=device)
    # What follows a get is loaded, and has memory, before the first one: the host may have to wait
    # for that. Other sizes are other kernels.
    for count in (1, 7, 5000, 1 << 16, 1 << 20):
        assert torch.equal(source[:count], source[:count].clone())
    torch.cuda.synchronize(device)
    for n in range(changes):
        receivers = [1] if n % 2 == 0 else list(range(1, processes))
        if process != 0 and process not in receivers:
            continue
        count = 1 + n * 4999 % (1 << 20)
        layout = core.Layout([core.TensorSpec("int32", (count,))])
        channel = fabric.channel(0, receivers, layout, slots=1, mode=modes[n % 3])
        if process == 0:
            channel.put([source[:count]], 0)
        else:
            channel.get(process, 0)
            got = torch.as_tensor(channel.slot(process, 0), device=device).view(torch.int32)
            assert torch.equal(got[:count], source[:count]), n
        torch.cuda.synchronize(device)
        fabric.check()
        channel.close()
        del channel
        if n == changes // 2 - 1:
            early = taken()
    late = taken()
    fabric.close()
    return early, late


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
    # GPU 0 is the current one, as it was.
    device = ctypes.c_int(-1)
    driver.cuCtxGetDevice(ctypes.byref(device))
    assert context.value is None, f"a context of GPU {device.value} is current"
    out = []
    for device in range(2):
        flags, active = ctypes.c_uint(), ctypes.c_int()
        code = driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
        assert code == 0
        out.append(bool(active.value))
    return out


def cuda_abort_beside(process: int, processes: int, folder: Path, gpus: int, what: str) -> Any:
    """Process 0 aborts while a call of another thread waits for process 1, which makes that call
    only once the abort has returned. Returns whether it was told of the abort, and a bundle."""
    import threading

    import torch

    devices = [p % gpus for p in range(processes)]
    torch.cuda.set_device(devices[process])
    fabric = core.CudaFabric(devices, deadline=20.0, rendezvous=meet(folder, process, processes))
    layout = core.Layout([core.TensorSpec("uint8", (8,))])
    channel = fabric.channel(0, [1], layout, mode="kernel")

    def call() -> None:
        if what == "reset":
            fabric.reset()
        else:
            fabric.channel(0, [1], layout, mode="copy")

    aborted = folder / "aborted"
    told = ""
    if process == 0:
        waiting = threading.Thread(target=call)
        waiting.start()
        time.sleep(0.5)
        fabric.abort(0, "enough")
        try:
            fabric.check()
        except core.Aborted as e:
            told = str(e)
        aborted.touch()
        waiting.join()
    else:
        until = time.monotonic() + 15
        while not aborted.exists() and time.monotonic() < until:
            time.sleep(0.01)
        call()
    fabric.reset()
    sent = torch.arange(8, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    got = []
    if process == 0:
        channel.put([sent], 0)
    else:
        channel.get(1, 0)
        got = torch.as_tensor(channel.slot(1, 0), device="cuda")[:8].tolist()
    torch.cuda.synchronize()
    fabric.check()
    fabric.close()
    return told, got


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
        channel.get(1, 0)
        tensor.copy_(
            torch.as_tensor(channel.slot(1, 0), device=tensor.device)[:24].view(torch.int64)
        )
        channel.release(1, 0)
    torch.cuda.synchronize(devices[process])
    fabric.check()
    result = [failed, tensor.tolist()]
    fabric.close()
    return result


if __name__ == "__main__":
    main(globals())
