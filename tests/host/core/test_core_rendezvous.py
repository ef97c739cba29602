"""Processes that meet over sockets: strangers, wrong numbers, silence."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest

import asyncdiff_core as core

KEY = b"test"


class Meeting:
    """Process 0 of several, in a thread that holds what it returned or raised."""

    def __init__(self, address: str, processes: int = 2, timeout: float = 10.0) -> None:
        self.address = address
        self.result: Any = None
        self._thread = threading.Thread(
            target=self._run, args=(lambda: join(address, 0, processes, timeout),)
        )
        self._thread.start()
        for _ in range(500):
            if Path(address).exists():
                break
            time.sleep(0.01)

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            self.result = work()
        except Exception as e:
            self.result = e

    def over(self) -> Any:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.result


def join(
    address: str, process: int, processes: int = 2, timeout: float = 10.0, key: bytes = KEY
) -> core.SocketRendezvous:
    return core.SocketRendezvous(address, process, processes, authkey=key, timeout=timeout)


def stranger(address: str) -> socket.socket:
    out = socket.socket(socket.AF_UNIX)
    out.connect(address)
    return out


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "meet")


def all_come(meeting: Meeting) -> None:
    second = join(meeting.address, 1)
    first = meeting.over()
    assert isinstance(first, core.SocketRendezvous), first
    second._send(0, b"b")
    assert first.all_gather(b"a") == [b"a", b"b"]
    first.close()
    second.close()


def test_strangers_keep_nobody_out(address: str) -> None:
    """One that says nothing, one that goes at once, one that talks of other things."""
    meeting = Meeting(address)
    silent, gone, other = (stranger(address) for _ in range(3))
    gone.close()
    other.sendall(b"GET / HTTP/1.1\r\n\r\n")
    with pytest.raises(AuthenticationError):
        join(address, 1, key=b"guessed")
    all_come(meeting)
    silent.close()
    other.close()


def test_a_client_of_multiprocessing_can_join(address: str) -> None:
    meeting = Meeting(address)
    with Client(address, authkey=KEY) as peer:
        peer.send_bytes(b"1 of 2")
        assert peer.recv_bytes() == b"welcome"
        assert isinstance(meeting.over(), core.SocketRendezvous)
    meeting.over().close()


def test_a_stranger_alone_is_a_timeout(address: str) -> None:
    begun = time.monotonic()
    meeting = Meeting(address, timeout=1.0)
    silent = stranger(address)
    error = meeting.over()
    assert isinstance(error, TimeoutError)
    assert "only processes [0] of 2 came within 1.0 s (a connection was closed" in str(error)
    assert time.monotonic() - begun < 5
    silent.close()


@pytest.mark.parametrize(
    ("process", "processes", "message"),
    [
        (7, 3, "there is no process 7: they are numbered 0 to 2"),
        (1, 3, "two processes say that they are process 1"),
        (1, 4, "process 1 is one of 4, process 0 one of 3"),
    ],
)
def test_wrong_numbers_are_an_error_on_both_sides(
    address: str, process: int, processes: int, message: str
) -> None:
    meeting = Meeting(address, 3)
    first = join(address, 1, 3)
    with pytest.raises(core.InvalidArgument, match=message):
        join(address, process, processes)
    error = meeting.over()
    assert isinstance(error, core.InvalidArgument) and message in str(error)
    with pytest.raises((EOFError, OSError)):  # process 0 is gone
        first.all_gather(b"")
    first.close()


def test_nobody_listens(address: str) -> None:
    with pytest.raises(TimeoutError, match="process 0 does not listen"):
        join(address, 1, timeout=0.3)


def test_a_listener_that_says_nothing_is_a_timeout(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(address)
        mute.listen()
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match="does not answer"):
            join(address, 1, timeout=0.5)
        assert time.monotonic() - begun < 5


def halves(peer: Connection) -> None:
    """The beginning of a message that does not go on."""
    with socket.socket(fileno=peer.fileno()) as raw:
        raw.sendall(b"\0\0\0\x09asy")
        raw.detach()


@pytest.mark.parametrize("silence", [lambda peer: None, halves], ids=["nothing", "half a message"])
def test_silence_is_a_timeout(address: str, silence: Callable[[Connection], None]) -> None:
    meeting = Meeting(address, timeout=0.5)
    second = join(address, 1, timeout=0.5)
    first = meeting.over()
    silence(second._peers[0])
    with pytest.raises(TimeoutError, match=r"process 1 said nothing for 0.5 s"):
        first.all_gather(b"")
    with pytest.raises(TimeoutError, match=r"process 0 said nothing for 0.5 s"):
        second.all_gather(b"")
    first.close()
    second.close()


def test_a_key_is_bytes(address: str) -> None:
    with pytest.raises(TypeError, match="authkey is bytes, not str"):
        core.SocketRendezvous(address, 0, 1, authkey="secret")  # type: ignore[arg-type]
