"""How the processes of a fabric find each other: over whatever connects them already.

A rendezvous is used while fabrics and channels are made and reset, never while data moves.
"""

from __future__ import annotations

import datetime
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .errors import CollectiveTimeout, ProcessLost


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
    """Over a ``torch.distributed`` store (TCPStore, FileStore, HashStore).

    The store may live on when processes are started again, and hold keys of an attempt before, or
    of another rendezvous: with the first gather, process 0 chooses a name at random and makes sure
    that all others of this attempt have heard it; all keys are under that name. A key goes
    when everybody has read it. ``prefix`` is for rendezvous in one store that are made at
    the same time.

    Raises CollectiveTimeout where a process does not come within the store's own timeout,
    ProcessLost where the store is gone. The store is neither authenticated nor encrypted; what
    comes out of it is never unpickled.
    """

    def __init__(self, store: Any, process: int, processes: int, prefix: str = "asyncdiff") -> None:
        self.process = process
        self.processes = processes
        self._store = store
        self._prefix = prefix
        self._name = ""
        self._round = 0
        self._before: list[str] = []

    def all_gather(self, mine: bytes) -> list[bytes]:
        """Everybody's bytes, in order of process."""
        limit = time.monotonic() + _seconds(self._store)
        if not self._name:
            self._name = self._agreed_name(limit)
        stem = f"{self._prefix}/{self._name}/{self._round}"
        self._round += 1
        self._set(f"{stem}/{self.process}", mine)
        out = [self._get(f"{stem}/{p}", p, limit) for p in range(self.processes)]
        # Who is in this round has read all of the one before.
        for key in self._before:
            self._ask(self._store.delete_key, key)
        self._before = [f"{stem}/{self.process}"]
        return out

    def _agreed_name(self, limit: float) -> str:
        """A name that no other attempt has. Everybody leaves a number of its own at a place
        that stays the same; what an attempt before has left there is answered, too, and heard by
        nobody."""
        if self.processes == 1:
            return secrets.token_hex(8)
        place = f"{self._prefix}/here"
        if self.process != 0:
            number = secrets.token_hex(8)
            self._set(f"{place}/{self.process}", number.encode())
            answer = f"{place}/{self.process}/{number}"
            name = self._get(answer, 0, limit).decode()
            self._set(f"{self._prefix}/{name}/heard/{self.process}", b"")
            return name
        name = secrets.token_hex(8)
        answered: dict[int, bytes] = {}
        missing = set(range(1, self.processes))
        answers = []
        while missing:
            for p in sorted(missing):
                heard = f"{self._prefix}/{name}/heard/{p}"
                if self._there(heard):
                    missing.discard(p)
                    answers.append(heard)
                elif self._there(f"{place}/{p}"):
                    theirs = self._get(f"{place}/{p}", p, limit)
                    if answered.get(p) != theirs:
                        answered[p] = theirs
                        answers.append(f"{place}/{p}/{theirs.decode(errors='replace')}")
                        self._set(answers[-1], name.encode())
            if missing and time.monotonic() > limit:
                raise self._late(min(missing))
            if missing:
                time.sleep(0.01)
        self._before = answers
        return name

    def _set(self, key: str, value: bytes) -> None:
        # A key without a value cannot be told from one that is missing: the first byte is filler.
        self._ask(self._store.set, key, b"." + value)

    def _there(self, key: str) -> bool:
        return bool(self._ask(self._store.check, [key]))

    def _get(self, key: str, process: int, limit: float) -> bytes:
        """What ``process`` has set, or is about to."""
        wait = max(limit - time.monotonic(), 0.01)
        try:
            self._store.wait([key], datetime.timedelta(seconds=wait))
        except Exception as e:
            # A store that is gone says so again; one that answers has not got the key in time.
            if not self._there(key):
                raise self._late(self._straggler(process)) from e
        return bytes(self._ask(self._store.get, key))[1:]

    def _straggler(self, process: int) -> int:
        """Whom a wait for ``process`` is about: process 0 itself waits, until all have heard the
        name, for whoever has not."""
        if process != 0 or self._round > 1:
            return process
        places = ["here", *([f"{self._name}/heard"] if self._name else [])]
        keys = ((p, f"{self._prefix}/{x}/{p}") for x in places for p in range(1, self.processes))
        return next((p for p, key in keys if not self._there(key)), 0)

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as e:
            raise ProcessLost(
                f"the store does not answer, its process may have ended ({type(e).__name__}: "
                f"{str(e).splitlines()[0] if str(e) else ''})"
            ) from e

    def _late(self, process: int) -> CollectiveTimeout:
        return CollectiveTimeout(
            f"process {process} did not come within the {_seconds(self._store):g} s of the store",
            process,
        )


def _seconds(store: Any) -> float:
    """A store's own timeout."""
    seconds: float = store.timeout.total_seconds()
    return seconds
