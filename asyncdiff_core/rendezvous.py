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


class SocketRendezvous:
    """Over plain sockets: process 0 listens, the others connect to it.

    ``address`` is as in :mod:`multiprocessing.connection`: ``("127.0.0.1", 29400)``, or the path
    of a Unix socket. ``authkey`` is a secret that all processes know. Raises TimeoutError where a
    process does not come or answer within ``timeout`` seconds, EOFError where one ends.
    """

    def __init__(
        self,
        address: Any,
        process: int,
        processes: int,
        *,
        authkey: bytes,
        timeout: float = 60.0,
    ) -> None:
        import time
        from multiprocessing.connection import Client, Connection, Listener

        self.process = process
        self.processes = processes
        self._timeout = timeout
        self._peers: dict[int, Connection] = {}
        limit = time.monotonic() + timeout
        if process == 0:
            with Listener(address, backlog=processes, authkey=authkey) as listener:
                socket = listener._listener._socket  # type: ignore[attr-defined]
                while len(self._peers) < processes - 1:
                    socket.settimeout(max(limit - time.monotonic(), 0.01))
                    try:
                        peer = listener.accept()
                    except TimeoutError:
                        found = sorted({0, *self._peers})
                        raise TimeoutError(
                            f"only processes {found} of {processes} came within {timeout} s"
                        ) from None
                    self._peers[int(self._receive(peer, "a new process"))] = peer
            return
        while True:
            try:
                peer = Client(address, authkey=authkey)
                break
            except (ConnectionRefusedError, FileNotFoundError):
                if time.monotonic() > limit:
                    raise TimeoutError(f"process 0 does not listen at {address}") from None
                time.sleep(0.05)
        peer.send_bytes(str(process).encode())
        self._peers[0] = peer

    def all_gather(self, mine: bytes) -> list[bytes]:
        """Everybody's bytes, in order of process."""
        import pickle

        if self.process != 0:
            self._peers[0].send_bytes(mine)
            gathered: list[bytes] = pickle.loads(self._receive(self._peers[0], "process 0"))
            return gathered
        parts = [mine]
        for p in range(1, self.processes):
            parts.append(self._receive(self._peers[p], f"process {p}"))
        everything = pickle.dumps(parts)
        for peer in self._peers.values():
            peer.send_bytes(everything)
        return parts

    def close(self) -> None:
        """Close the connections."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def _receive(self, peer: Any, name: str) -> bytes:
        if not peer.poll(self._timeout):
            raise TimeoutError(f"{name} said nothing for {self._timeout} s")
        data: bytes = peer.recv_bytes()
        return data
