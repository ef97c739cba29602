"""Ranks that run programs and measure how long a round takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

import asyncdiff_core as core

from .machine import Machine
from .program import Program

T = TypeVar("T")

#: Runs a program once more and returns how long rank 0 took, in seconds.
Round = Callable[[], float]


class World(Protocol):
    """All ranks, of which ``local`` run in this process. Its methods are collective: every process
    calls them in the same order."""

    machine: Machine
    devices: Sequence[torch.device]
    local: Sequence[int]

    def fabric(self, ranks: int) -> core.Fabric:
        """asyncdiff's fabric over at least the first so many ranks, made when it is asked for."""

    def launches(self) -> Sequence[str]:
        """The ways in which programs can be issued."""

    def prepare(self, program: Program, launch: str, joint: bool) -> Round:
        """Make everything ready that a round needs: the program has then run at least once.

        ``joint``: both ends of a link have to be captured in one graph.
        """

    def synchronize(self) -> None:
        """Wait until nothing is in flight, in any process."""

    def gather(self, value: T) -> list[T]:
        """The value of every process; it has to fit into JSON."""

    def recover(self) -> None:
        """After a failure: nothing of it may be seen by what is measured next."""

    def close(self) -> Any:
        """End it."""
