"""A rendezvous over plain sockets."""

from __future__ import annotations

from typing import Any

from . import _core
from .errors import InvalidArgument


class SocketRendezvous:
    """Over plain sockets: process 0 listens, the others connect to it.

    ``address`` is ``("127.0.0.1", 29400)``, or the path of a Unix socket. ``authkey`` is a secret
    that all processes know. Both sides prove in the handshake that they know it, and each message
    after it carries such a proof (HMAC-SHA256): who does not know it can neither join, nor say
    anything, nor hold anybody up. What is sent is not encrypted, and never unpickled.

    Meets the others within ``timeout`` seconds in all, and then waits as long for each gather.
    Raises CollectiveTimeout (a TimeoutError) where a process does not come, AuthenticationError
    where process 0 has another key, InvalidArgument (here and in process 0) for a process that does
    not exist, is there already, or counts otherwise, CoreError where the address cannot be had.
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
        if not isinstance(authkey, bytes):
            raise TypeError(f"authkey is bytes, not {type(authkey).__name__}")
        host, port, path = _parts(address)
        self._hold(_core.SocketRendezvous(host, port, path, process, processes, authkey, timeout))

    @classmethod
    def from_environment(cls, *, timeout: float = 60.0) -> SocketRendezvous:
        """From what a launcher sets: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (or
        ASYNCDIFF_PORT, as under torchrun, which listens at MASTER_PORT itself), and the secret
        ASYNCDIFF_AUTHKEY. Raises InvalidArgument where one is missing."""
        out = cls.__new__(cls)
        out._hold(_core.SocketRendezvous.from_environment(timeout))
        return out

    def _hold(self, native: _core.SocketRendezvous) -> None:
        self._native = native
        #: this process, from 0
        self.process = native.process
        #: how many there are
        self.processes = native.processes

    def all_gather(self, mine: bytes) -> list[bytes]:
        """Everybody's bytes, in order of process. Raises ProcessLost where one has ended or closed
        its rendezvous, CollectiveTimeout where one says nothing: in all processes that are left,
        from then on."""
        return self._native.all_gather(mine)

    def close(self) -> None:
        """Close the connections."""
        self._native.close()


def _parts(address: Any) -> tuple[str, int, str]:
    """Host and port, or a path."""
    if isinstance(address, tuple) and len(address) == 2:
        return str(address[0]), int(address[1]), ""
    if isinstance(address, str) and address:
        return "", 0, address
    raise InvalidArgument(f"address {address!r}: a pair of host and port, or a path")
