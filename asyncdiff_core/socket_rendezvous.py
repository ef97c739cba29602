"""A rendezvous over plain sockets."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from typing import Any

from .errors import InvalidArgument

#: The part of the timeout, and the seconds, that process 0 at most gives a connection to say who it
#: is, while others wait in line. A process that took longer comes again.
_PATIENCE = 0.1, 5.0
_WELCOME = b"welcome"


class SocketRendezvous:
    """Over plain sockets: process 0 listens, the others connect to it.

    ``address`` is as in :mod:`multiprocessing.connection`: ``("127.0.0.1", 29400)``, or the path
    of a Unix socket. ``authkey`` is a secret that all processes know: process 0 ignores whoever
    does not. Raises TimeoutError where a process does not come or answer within ``timeout``
    seconds, EOFError where one ends, AuthenticationError where process 0 has another key,
    InvalidArgument (here and in process 0) for a process that does not exist, is there already,
    or counts otherwise.
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
        self.process = process
        self.processes = processes
        self._timeout = timeout
        self._peers: dict[int, Connection] = {}
        limit = time.monotonic() + timeout
        try:
            if process == 0:
                self._listen(address, authkey, limit)
            else:
                self._join(address, authkey, limit)
        except BaseException:
            self.close()
            raise

    def all_gather(self, mine: bytes) -> list[bytes]:
        """Everybody's bytes, in order of process."""
        if self.process != 0:
            self._send(0, mine)
            gathered: list[bytes] = pickle.loads(self._receive(0))
            return gathered
        parts = [mine, *(self._receive(p) for p in range(1, self.processes))]
        everything = pickle.dumps(parts)
        for p in self._peers:
            self._send(p, everything)
        return parts

    def close(self) -> None:
        """Close the connections."""
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def _listen(self, address: Any, authkey: bytes, limit: float) -> None:
        strangers = ""
        with Listener(address, backlog=self.processes) as listener:
            door: socket.socket = listener._listener._socket  # type: ignore[attr-defined]
            while len(self._peers) < self.processes - 1:
                door.settimeout(_until(limit))
                try:
                    peer = listener.accept()
                except TimeoutError:
                    raise TimeoutError(
                        f"only processes {sorted({0, *self._peers})} of {self.processes} came "
                        f"within {self._timeout} s{strangers}"
                    ) from None
                try:
                    share, most = _PATIENCE
                    _limit(peer, min(share * self._timeout, most))
                    deliver_challenge(peer, authkey)
                    answer_challenge(peer, authkey)
                    hello = peer.recv_bytes(256)
                # AssertionError: what Python before 3.12 says of bytes that are no challenge.
                except (AuthenticationError, EOFError, OSError, ValueError, AssertionError) as e:
                    strangers = f" (a connection was closed: {type(e).__name__} {e})"
                    peer.close()
                    continue
                self._admit(peer, hello)

    def _admit(self, peer: Connection, hello: bytes) -> None:
        """Keep the connection if it is of a process that is missing."""
        number, _, count = hello.decode(errors="replace").partition(" of ")
        refusal = ""
        if not (number.isdecimal() and count.isdecimal()):
            refusal = "a process does not say who it is: all processes need the same asyncdiff"
        elif int(count) != self.processes:
            refusal = f"process {number} is one of {count}, process 0 one of {self.processes}"
        elif not 0 < int(number) < self.processes:
            refusal = f"there is no process {number}: they are numbered 0 to {self.processes - 1}"
        elif int(number) in self._peers:
            refusal = f"two processes say that they are process {number}"
        try:
            _limit(peer, self._timeout)
            peer.send_bytes(refusal.encode() or _WELCOME)
        except OSError:  # it ended while it waited
            peer.close()
            return
        if refusal:
            peer.close()
            raise InvalidArgument(refusal)
        self._peers[int(number)] = peer

    def _join(self, address: Any, authkey: bytes, limit: float) -> None:
        while True:
            peer = None
            try:
                peer = _connect(address, limit)
                _limit(peer, _until(limit))
                answer_challenge(peer, authkey)
                deliver_challenge(peer, authkey)
                peer.send_bytes(f"{self.process} of {self.processes}".encode())
                answer = peer.recv_bytes()
                break
            # Not there yet, or too busy to have listened in time: once more.
            except (
                EOFError,
                ConnectionError,
                FileNotFoundError,
                BlockingIOError,
                TimeoutError,
            ) as e:
                if peer is not None:
                    peer.close()
                if time.monotonic() > limit:
                    raise TimeoutError(
                        f"process 0 does not listen at {address}, does not answer, or has met all "
                        f"its processes: {type(e).__name__} {e}"
                    ) from None
                time.sleep(0.05)
            except BaseException:
                if peer is not None:
                    peer.close()
                raise
        if answer != _WELCOME:
            peer.close()
            raise InvalidArgument(answer.decode())
        _limit(peer, self._timeout)
        self._peers[0] = peer

    def _send(self, process: int, data: bytes) -> None:
        try:
            self._peers[process].send_bytes(data)
        except BlockingIOError:
            raise self._silent(process) from None

    def _receive(self, process: int) -> bytes:
        try:
            return self._peers[process].recv_bytes()
        except BlockingIOError:
            raise self._silent(process) from None

    def _silent(self, process: int) -> TimeoutError:
        return TimeoutError(f"process {process} said nothing for {self._timeout} s")


def _until(limit: float) -> float:
    return max(limit - time.monotonic(), 0.01)


def _connect(address: Any, limit: float) -> Connection:
    """multiprocessing's Client, which has no timeout."""
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    with socket.socket(family) as door:
        door.settimeout(_until(limit))
        door.connect(address)
        door.setblocking(True)
        return Connection(door.detach())


def _limit(peer: Connection, seconds: float) -> None:
    """No read or write of the connection waits longer: BlockingIOError, in the middle of a message
    too, where poll() sees its beginning only."""
    span = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    with socket.socket(fileno=os.dup(peer.fileno())) as same:
        same.setblocking(True)  # a default timeout of sockets would change it
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            same.setsockopt(socket.SOL_SOCKET, option, span)
