"""Arrays are there as long as a call uses them, whatever becomes of the list that they came in."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from core_bundles import receive

import asyncdiff_core as core

LAYOUT = core.Layout([core.TensorSpec("int64", (3,))])


class Fleeting:
    """Its memory is made for each look at it, and hangs on what the look gave."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Any]] = []

    def look(self) -> torch.Tensor:
        memory = np.arange(3)
        self.made.append(weakref.ref(memory))
        return torch.from_numpy(memory)


class FleetingDLPack(Fleeting):
    def __dlpack__(self) -> object:
        return self.look().__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class FleetingInterface(Fleeting):
    @property
    def __array_interface__(self) -> dict[str, Any]:
        array = self.look().numpy()
        return array.__array_interface__ | {"mine": array}


def make(kind: str) -> tuple[list[Any], list[weakref.ref[Any]]]:
    """A list with an array, and what is to stay alive."""
    if kind in ("dlpack", "interface"):
        fleeting = FleetingDLPack() if kind == "dlpack" else FleetingInterface()
        return [fleeting], fleeting.made
    array: Any = np.arange(3) if kind == "numpy" else torch.arange(3)
    return [array], [weakref.ref(array)]


@pytest.mark.parametrize("kind", ["torch", "numpy", "dlpack", "interface"])
@pytest.mark.parametrize("operation", ["put", "put_batch"])
def test_arrays_live_while_a_call_waits(operation: str, kind: str) -> None:
    fabric = core.HostFabric(2)
    channel = fabric.channel(0, [1], LAYOUT, slots=1)
    arrays, alive = make(kind)
    channel.put([np.zeros(3, np.int64)], 0)  # now a put waits

    def call() -> None:
        if operation == "put":
            channel.put(arrays, 0)
        else:
            fabric.put_batch([(channel, arrays, 0)])

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.2)
    arrays.clear()
    gc.collect()
    waited_with = [ref() is not None for ref in alive]
    receive(channel, 1, 0)
    assert receive(channel, 1, 0)[0].tolist() == [0, 1, 2]
    thread.join(10)
    assert waited_with == [True]
    fabric.check()


def test_threads_may_be_in_calls_when_the_interpreter_ends() -> None:
    """Up to Python 3.13 these threads ended the process by std::terminate."""
    program = """
import threading, time
import asyncdiff_core as core
fabric = core.HostFabric(2)
def look():
    while True:
        fabric.check()
for _ in range(4):
    threading.Thread(target=look, daemon=True).start()
time.sleep(0.05)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, b"")
