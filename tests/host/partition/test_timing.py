"""The gate behind which pieces of work are timed on a GPU, with a GPU that is played."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asyncdiff.partition import timing
from asyncdiff.partition.timing import Gate, milliseconds


class Gpu:
    """Whose gate opens after so many cycles, while a filling of its queue takes ``filling``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, filling: int) -> None:
        self.filling, self.held, self.gates = filling, 0, list[int]()
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self._sleep)

    def _sleep(self, cycles: int) -> None:
        self.held = cycles
        self.gates.append(cycles)

    def record(self) -> None:
        """As an event."""

    def query(self) -> bool:
        """Whether the gate has opened by now."""
        return self.held <= self.filling


@pytest.mark.parametrize("filling", [0, timing._SHORT - 1, timing._SHORT, timing._LONG - 1])
def test_a_gate_is_as_long_as_the_queue_takes_to_fill(
    monkeypatch: pytest.MonkeyPatch, filling: int
) -> None:
    gpu, filled = Gpu(monkeypatch, filling), 0
    gate = Gate(torch.device("cuda", 0))

    def enqueue() -> None:
        nonlocal filled
        filled += 1

    event: Any = gpu
    gate.hold(event, enqueue)
    assert filled == len(gpu.gates) and filling < gate.cycles <= max(timing._SHORT, 2 * filling)
    gate.hold(event, enqueue)  # it is long enough from now on
    assert filled == len(gpu.gates) and gpu.gates[-2:] == [gate.cycles] * 2


def test_a_gate_is_not_made_longer_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: Any = Gpu(monkeypatch, 1 << 60)
    Gate(torch.device("cuda", 0)).hold(gpu, lambda: None)
    assert max(gpu.gates) == timing._LONG and len(gpu.gates) < 12


def test_on_a_cpu_pieces_are_timed_as_they_are() -> None:
    done: list[int] = []
    pieces = [lambda: done.append(0), lambda: done.append(1)]
    assert all(ms >= 0 for ms in milliseconds(pieces, torch.device("cpu")))
    assert done == [0, 1]
