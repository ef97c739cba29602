"""Processes that meet over sockets and stores: strangers, wrong numbers, silence, restarts."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import asyncdiff_core as core

KEY = b"test"


class Meeting:
    """Process 0 of several, in a thread that holds what it returned or raised."""

    def __init__(self, address: Any, processes: int = 2, timeout: float = 10.0) -> None:
        self.address = address
        self.result: Any = None
        self._thread = threading.Thread(
            target=self._run, args=(lambda: join(address, 0, processes, timeout),)
        )
        self._thread.start()
        for _ in range(500):
            if isinstance(address, tuple) or Path(address).exists():
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
    address: Any, process: int, processes: int = 2, timeout: float = 10.0, key: bytes = KEY
) -> core.SocketRendezvous:
    return core.SocketRendezvous(address, process, processes, authkey=key, timeout=timeout)


def stranger(address: str) -> socket.socket:
    out = socket.socket(socket.AF_UNIX)
    out.connect(address)
    return out


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path / "meet")


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returned or raised, in a thread each."""
    results: list[Any] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except Exception as e:
            results[i] = e

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def met(address: Any, processes: int = 2, timeout: float = 10.0) -> list[core.SocketRendezvous]:
    all_ = together(*(lambda p=p: join(address, p, processes, timeout) for p in range(processes)))
    for one in all_:
        assert isinstance(one, core.SocketRendezvous), one
    return all_


def test_bytes_of_any_size_are_gathered(address: str) -> None:
    first, second, third = met(address, 3)
    for size in (0, 1, 100_000, 5_000_000):
        said = [bytes([p]) * (size + p) for p in range(3)]
        calls = (functools.partial(r.all_gather, said[r.process]) for r in (first, second, third))
        assert together(*calls) == [said] * 3
    with pytest.raises(core.CoreError, match="the rendezvous is closed"):
        first.close()
        first.all_gather(b"")
    assert not Path(address).exists()


def test_over_tcp() -> None:
    address = ("127.0.0.1", free_port())
    first, second = met(address)
    assert (
        together(lambda: first.all_gather(b"a"), lambda: second.all_gather(b"b"))
        == [[b"a", b"b"]] * 2
    )
    first.close()
    second.close()
    met(address)  # at once again


def test_strangers_keep_nobody_out(address: str) -> None:
    """One that says nothing, one that goes at once, one that talks of other things, one that
    guesses."""
    meeting = Meeting(address)
    silent, gone, other = (stranger(address) for _ in range(3))
    gone.close()
    other.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    with pytest.raises(core.AuthenticationError, match="another key"):
        join(address, 1, key=b"guessed")
    second = join(address, 1)
    first = meeting.over()
    assert isinstance(first, core.SocketRendezvous), first
    assert (
        together(lambda: first.all_gather(b"a"), lambda: second.all_gather(b"b"))
        == [[b"a", b"b"]] * 2
    )
    silent.close()
    other.close()


def test_slow_strangers_hold_nobody_up(address: str) -> None:
    """Twenty of them that send a byte now and then, against the timeout and those who come."""
    meeting = Meeting(address, timeout=1.5)
    begun = time.monotonic()
    slow = [stranger(address) for _ in range(20)]
    while time.monotonic() < begun + 1.0:
        for one in slow:
            one.sendall(b"x")
        time.sleep(0.1)
    error = meeting.over()
    assert isinstance(error, core.CollectiveTimeout) and isinstance(error, TimeoutError)
    assert "only processes [0] of 2 came within 1.5 s" in str(error)
    assert time.monotonic() - begun < 2.5
    meeting = Meeting(address, timeout=20)
    more = [stranger(address) for _ in range(200)]
    begun = time.monotonic()
    join(address, 1)
    assert isinstance(meeting.over(), core.SocketRendezvous)
    assert time.monotonic() - begun < 5
    for one in slow + more:
        one.close()


@pytest.mark.parametrize(
    ("process", "processes", "message"),
    [
        (7, 8, "process 7 is one of 8, process 0 one of 3"),
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
    with pytest.raises(core.ProcessLost, match="process 0 has ended") as lost:
        first.all_gather(b"")
    assert lost.value.process == 0


def test_arguments_that_cannot_be_meant(address: str) -> None:
    with pytest.raises(TypeError, match="authkey is bytes, not str"):
        core.SocketRendezvous(address, 0, 1, authkey="secret")  # type: ignore[arg-type]
    with pytest.raises(core.InvalidArgument, match="process 3 of 3"):
        join(address, 3, 3)
    with pytest.raises(core.InvalidArgument, match="cannot guess"):
        join(address, 0, 2, key=b"")
    with pytest.raises(core.InvalidArgument, match="positive number of seconds"):
        join(address, 0, 2, timeout=0)
    with pytest.raises(core.InvalidArgument, match="a pair of host and port, or a path"):
        join(29400, 0, 2)
    with pytest.raises(core.InvalidArgument, match="port 0"):
        join(("127.0.0.1", 0), 0, 2)
    with pytest.raises(core.CoreError, match="process 0 cannot listen at"):
        join(str(Path(address) / "no" / "folder"), 0, 2)
    assert join(address, 0, 1).all_gather(b"me") == [b"me"]


def test_what_a_killed_process_left_is_no_hindrance(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(address)
    met(address)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(address)
        other.listen()
        with pytest.raises(core.CoreError, match="cannot listen"):
            join(address, 0, timeout=0.3)


def test_nobody_listens(address: str) -> None:
    with pytest.raises(core.CollectiveTimeout, match=r"process 0 was not met.* within 0.3 s") as e:
        join(address, 1, timeout=0.3)
    assert e.value.process == 0


def test_a_listener_that_says_nothing_is_a_timeout(address: str) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(address)
        mute.listen()
        begun = time.monotonic()
        with pytest.raises(core.CollectiveTimeout, match="does not answer"):
            join(address, 1, timeout=0.5)
        assert time.monotonic() - begun < 2


def test_a_listener_that_does_not_know_the_key_learns_nothing(address: str) -> None:
    """It plays process 0 as well as it can without the key."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen()

        def pretend() -> None:
            peer, _ = door.accept()
            peer.sendall(b"asyncdiff-meet-1" + os.urandom(32))
            peer.recv(88)
            peer.sendall(b"w" + bytes(255) + os.urandom(32))
            peer.close()

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(core.AuthenticationError):
            join(address, 1)
        thread.join()


class Relay:
    """Stands between process 0 and another one, and may change what goes through."""

    def __init__(self, address: str, behind: str) -> None:
        self.change: Callable[[bytes], bytes] = lambda data: data
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(address)
        self._door.listen()
        self._behind = behind
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        near, _ = self._door.accept()
        far = stranger(self._behind)

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):  # one of them has ended
                while data := source.recv(1 << 16):
                    sink.sendall(self.change(data))
                sink.shutdown(socket.SHUT_WR)

        threading.Thread(target=pump, args=(far, near), daemon=True).start()
        pump(near, far)


class Shell:
    """Unpickled, it leaves a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_what_is_changed_on_the_way_is_refused_and_nothing_is_unpickled(tmp_path: Path) -> None:
    meeting = Meeting(str(tmp_path / "meet"))
    relay = Relay(str(tmp_path / "relay"), meeting.address)
    second = join(str(tmp_path / "relay"), 1)
    first = meeting.over()
    evil = pickle.dumps([Shell(str(tmp_path / "ran"))])
    # Bytes are bytes, whatever they look like.
    heard = together(lambda: first.all_gather(evil), lambda: second.all_gather(b""))
    assert heard == [[evil, b""]] * 2
    relay.change = lambda data: data.replace(b"good", b"evil")
    heard = together(lambda: first.all_gather(b""), lambda: second.all_gather(b"good"))
    for error in heard:
        assert isinstance(error, core.ProcessLost), error
    assert "process 1 is not to be believed" in str(heard[0])
    assert not (tmp_path / "ran").exists()


def test_a_message_cannot_be_sent_twice(tmp_path: Path) -> None:
    meeting = Meeting(str(tmp_path / "meet"))
    relay = Relay(str(tmp_path / "relay"), meeting.address)
    second = join(str(tmp_path / "relay"), 1)
    first = meeting.over()
    relay.change = lambda data: data * 2
    together(lambda: first.all_gather(b""), lambda: second.all_gather(b""))
    relay.change = lambda data: b""
    with pytest.raises(core.ProcessLost, match="not to be believed"):
        first.all_gather(b"")


def test_silence_is_a_timeout(address: str) -> None:
    first, second = met(address, timeout=0.5)
    with pytest.raises(core.CollectiveTimeout, match=r"process 1 said nothing for 0.5 s") as e:
        first.all_gather(b"")
    assert e.value.process == 1
    with pytest.raises(core.CollectiveTimeout, match=r"process 1 said nothing for 0.5 s"):
        second.all_gather(b"")  # process 0 has told it
    with pytest.raises(core.CollectiveTimeout):
        first.all_gather(b"")


def test_an_end_is_known_to_all_at_once(address: str) -> None:
    first, second, third = met(address, 3, timeout=30)
    second.close()
    begun = time.monotonic()
    for error in together(lambda: first.all_gather(b""), lambda: third.all_gather(b"")):
        assert isinstance(error, core.ProcessLost), error
        assert error.process == 1 and "process 1 has ended" in str(error)
    assert time.monotonic() - begun < 5


WORLD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


def test_from_a_launchers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**WORLD, "ASYNCDIFF_AUTHKEY": "test"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ASYNCDIFF_PORT", str(port := free_port()))
    meeting = Meeting(("127.0.0.1", port))
    second = core.SocketRendezvous.from_environment(timeout=10)
    assert (second.process, second.processes) == (1, 2)
    assert isinstance(meeting.over(), core.SocketRendezvous)


@pytest.mark.parametrize("missing", [*WORLD, "ASYNCDIFF_AUTHKEY"])
def test_what_is_missing_in_the_environment_is_named(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**WORLD, "ASYNCDIFF_AUTHKEY": "test"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("ASYNCDIFF_PORT", raising=False)
    monkeypatch.delenv(missing)
    with pytest.raises(core.InvalidArgument, match=f"{missing} is not set"):
        core.SocketRendezvous.from_environment()
    monkeypatch.setenv(missing, "some" if missing != "ASYNCDIFF_AUTHKEY" else "test")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    if missing == "ASYNCDIFF_AUTHKEY":
        with pytest.raises(core.InvalidArgument, match="torchrun itself listens"):
            core.SocketRendezvous.from_environment()


def rendezvous(store: Any, process: int, processes: int = 2) -> core.StoreRendezvous:
    return core.StoreRendezvous(store, process, processes)


def gather(store: Any, process: int, mine: bytes) -> Any:
    one = rendezvous(store, process)
    return [one.all_gather(mine), one.all_gather(mine + b"!")]


def stores(tmp_path: Path) -> list[Any]:
    from torch.distributed import FileStore

    return [FileStore(str(tmp_path / "store"), 2) for _ in range(2)]


def test_a_store_keeps_attempts_and_instances_apart(tmp_path: Path) -> None:
    for attempt in (b"a", b"b", b"c"):
        both = stores(tmp_path)
        calls = (functools.partial(gather, both[p], p, attempt + bytes([p])) for p in range(2))
        heard = together(*calls)
        first = [attempt + b"\0", attempt + b"\1"]
        assert heard == [[first, [x + b"!" for x in first]]] * 2


@pytest.mark.parametrize("gone", [0, 1])
def test_a_store_forgets_an_attempt_that_stopped_half_way(gone: int, tmp_path: Path) -> None:
    """One process of an attempt left its keys and ended; the next attempt is not misled."""
    both = stores(tmp_path)
    thread = threading.Thread(
        target=lambda: together(lambda: gather(both[1 - gone], 1 - gone, b"old")), daemon=True
    )
    for store in both:
        store.set_timeout(datetime.timedelta(seconds=0.4))
    thread.start()
    thread.join(5)
    again = stores(tmp_path)
    heard = together(*(lambda p=p: gather(again[p], p, b"new%d" % p) for p in range(2)))
    assert heard[0][0] == [b"new0", b"new1"] and heard[0] == heard[1]


def test_a_store_leaves_little_behind() -> None:
    from torch.distributed import HashStore

    store = HashStore()
    counts = []
    for _ in range(3):
        together(*(lambda p=p: gather(store, p, b"x") for p in range(2)))
        counts.append(store.num_keys())
    assert counts[2] - counts[1] <= 2  # of the last round, one a process


def test_who_does_not_come_to_a_store_is_named(tmp_path: Path) -> None:
    store = stores(tmp_path)[0]
    store.set_timeout(datetime.timedelta(seconds=0.3))
    with pytest.raises(core.CollectiveTimeout, match=r"process 1 did not come within") as e:
        rendezvous(store, 0).all_gather(b"")
    assert e.value.process == 1
    with pytest.raises(core.CollectiveTimeout, match=r"process 0 did not come within"):
        rendezvous(store, 1).all_gather(b"")


RESTARTED = """
import datetime, os, signal, sys, time
from torch.distributed import TCPStore
import asyncdiff_core as core
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, False,
                 timeout=datetime.timedelta(seconds=30))
for _ in range(2):
    fabric = core.HostFabric(size, rendezvous=core.StoreRendezvous(store, rank, size))
    assert fabric.all_gather(bytes([attempt])) == [bytes([attempt])] * size
    if attempt == 0 and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        fabric.all_gather(b"")
    except core.ProcessLost as e:
        assert attempt == 0 and e.process == 1
        raise
    fabric.close()
open(f"{sys.argv[1]}/came back {rank} {attempt}", "w")
"""


@pytest.mark.slow
def test_torchrun_starts_again(tmp_path: Path) -> None:
    """A rank is killed; the second attempt meets on a store that still has the keys of the
    first."""
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--max-restarts", "1", "--monitor-interval", "0.2"),
            *("--master-addr", "127.0.0.1", "--master-port", str(free_port()), str(script)),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in tmp_path.glob("came*")} == {"came back 0 1", "came back 1 1"}
