"""A process that compiles pieces for another one, which started it; see :mod:`.pool`."""

from __future__ import annotations

import json
import os
import pickle
import queue
import select
import socket
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ...errors import reason
from . import settings
from .kinds import Layout, made
from .transport import receive, send, unpacked

#: Seconds between two looks at whether the process that started this one is still there.
_LOOK = 1.0
#: Seconds that a message may take.
_PATIENCE = 60.0


def main(handle: int, parent: int) -> None:
    """Compile what comes over the socket ``handle``, until it is closed or ``parent`` has ended."""
    connection = socket.socket(fileno=handle)
    connection.settimeout(_PATIENCE)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # While this thread compiles, another one notices that nobody wants it any more.
    threading.Thread(target=_listen, args=(connection, parent, jobs), daemon=True).start()
    taken, devices = pickle.loads(jobs.get())
    _stay_off_gpus()
    with torch.no_grad():
        try:
            settings.take(taken)
            _warm_up(devices)
        except Exception:  # pieces will fail then, and say why
            pass
        while True:
            send(connection, json.dumps(_compiled(jobs.get())).encode())


def _listen(connection: socket.socket, parent: int, jobs: queue.SimpleQueue[bytes]) -> None:
    try:
        while os.getppid() == parent:
            if select.select([connection], [], [], _LOOK)[0]:
                jobs.put(receive(connection))
    except (OSError, EOFError):
        pass
    finally:
        os._exit(0)


def _compiled(job: bytes) -> tuple[str, str]:
    """Compile a piece; what went wrong, and where; "" for nothing."""
    try:
        made(*unpacked(job))
    except Exception as e:
        return reason(e), traceback.format_exc()
    return "", ""


def _warm_up(devices: Sequence[str]) -> None:
    """Compile something small, so that all that inductor imports is there when pieces come."""
    for device in {torch.device(d).type: torch.device(d) for d in reversed(devices)}.values():
        graph = fx.Graph()
        given = graph.placeholder("given_0")
        twice = graph.call_function(torch.ops.aten.add.Tensor, (given, given))
        graph.output((twice,))
        layout = Layout((64, 64), (64, 1), torch.float32, device, 0)
        made(fx.GraphModule(nn.Module(), graph), [layout])


def _stay_off_gpus() -> None:
    """Have torch not make a context of a GPU, which would take some of its memory.

    Compiling needs what GPUs are like, not the GPUs: inductor's own processes, which compile single
    kernels, do without, too. Tensors without memory make a context only for what this process does
    not do, and kernels are loaded by who runs them.
    """
    from torch._inductor.fx_passes import pad_mm
    from torch._subclasses import fake_tensor

    _leave_out(fake_tensor, "init_gpu_context")
    # Whether to pad a product whose sizes are odd, inductor finds out by running it. Odd sizes here
    # are mostly a text's tokens, which are rows: GPUs need no padding of these.
    _leave_out(pad_mm, "should_pad")
    # As where there is no GPU: numbers that patterns of inductor have as tensors stay on the CPU.
    fake_tensor.FakeTensorMode.avoid_device_init = True  # type: ignore[assignment, method-assign]
    # Nor is any GPU made the current one.
    for name in ("_exchange_device", "_maybe_exchange_device"):
        setattr(torch.cuda, name, lambda index: index)
    try:
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    except ImportError:  # there is no Triton
        return
    for name in ("_make_launchers", "_dynamic_scale_rblock"):
        _leave_out(CachingAutotuner, name)


def _leave_out(owner: Any, name: str) -> None:
    if hasattr(owner, name):
        setattr(owner, name, lambda *_, **__: None)
