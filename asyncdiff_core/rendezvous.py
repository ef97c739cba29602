"""How the processes of a fabric find each other: over whatever connects them already.

A rendezvous is used while fabrics and channels are made and reset, never while data moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Rendezvous(Protocol):
    """What a fabric of several processes needs. Any object with these three will do."""

    #: this process, from 0
    process: int
    #: how many there are
    processes: int

    def all_gather(self, mine: bytes) -> Sequence[bytes]:
        """Everybody's bytes, in order of process. All processes call it equally often, in the same
        order; raises where one does not come in time."""


class CallbackRendezvous:
    """Over a function that gathers bytes: ``CallbackRendezvous(c.rank, c.size, c.allgather)`` with
    an mpi4py communicator ``c``."""

    def __init__(
        self, process: int, processes: int, all_gather: Callable[[bytes], Sequence[bytes]]
    ) -> None:
        self.process = process
        self.processes = processes
        self._all_gather = all_gather

    def all_gather(self, mine: bytes) -> Sequence[bytes]:
        """Everybody's bytes, in order of process."""
        return self._all_gather(mine)


class StoreRendezvous:
    """Over a ``torch.distributed`` store (TCPStore, FileStore, HashStore), which waits at most for
    its own timeout.

    ``prefix`` keeps the keys of several rendezvous in one store apart; keys are never reused.
    """

    def __init__(self, store: Any, process: int, processes: int, prefix: str = "asyncdiff") -> None:
        self.process = process
        self.processes = processes
        self._store = store
        self._prefix = prefix
        self._round = 0

    def all_gather(self, mine: bytes) -> list[bytes]:
        """Everybody's bytes, in order of process."""
        stem = f"{self._prefix}/{self._round}"
        self._round += 1
        # A key without a value cannot be told from one that is missing: the first byte is filler.
        self._store.set(f"{stem}/{self.process}", b"." + mine)
        return [bytes(self._store.get(f"{stem}/{p}"))[1:] for p in range(self.processes)]
