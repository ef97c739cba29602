"""Who a process is in a group, and for how long the store of "env" is waited for."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from asyncdiff import InputError
from asyncdiff.processes import group
from asyncdiff.processes.group import membership
from asyncdiff_core.errors import InvalidArgument
from asyncdiff_core.process_group import rendezvous_of


@contextlib.contextmanager
def listening() -> Iterator[int]:
    """The port of a server that is no store: it takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def environment(patch: pytest.MonkeyPatch, rank: Any, size: Any, port: Any) -> None:
    named = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in named.items():
        patch.setenv(name, str(value))
    patch.setattr(group, "_met", {})


def refused(text: str, patience: float) -> float:
    """Seconds after which "env" is refused."""
    begun = time.monotonic()
    with pytest.raises(InputError, match=text):
        membership("env", patience)
    return time.monotonic() - begun


@pytest.mark.parametrize("there", ["another server", "nobody", "nobody else"])
def test_no_store_is_waited_for_as_long_as_is_said(
    there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(threading.enumerate())
    with listening() as port:
        answered = port
    with listening() as silent:
        port = silent if there == "another server" else answered
        environment(monkeypatch, 0 if there == "nobody else" else 1, 2, port)
        assert refused(r"not all of 2 processes came within 0\.4 s", 0.4) < 3
    for thread in set(threading.enumerate()) - others:  # torch's call, which ends with the server
        thread.join(20)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), ("", 2), ("one", 2), (0, "two")])
def test_a_rank_that_is_none_is_refused_at_once(
    rank: Any, size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch, rank, size, 1)
    assert refused(f"RANK={rank} of WORLD_SIZE={size}", 20) < 1


@pytest.mark.parametrize("port", [70000, "first"])
def test_a_port_that_is_none_is_refused_at_once(port: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, 1, 2, port)
    assert refused(f"127.0.0.1:{port} is not there", 20) < 1


def test_what_the_store_took_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(url: str, timeout: Any) -> Iterator[tuple[Any, int, int]]:
        time.sleep(0.3)
        yield dist.HashStore(), 0, 1

    environment(monkeypatch, 0, 1, 1)
    monkeypatch.setattr(group, "rendezvous", slow)
    assert membership("env", 5).store.timeout.total_seconds() <= 4.7
    assert membership("env", 5).store.timeout.total_seconds() > 4.9  # which is there by now


def test_a_process_outside_the_group_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = dist.GroupMember.NON_GROUP_MEMBER
    with pytest.raises(InputError, match="this process is not in the group"):
        membership(outside, 1)
    with pytest.raises(InputError, match="group is a int"):
        membership(3, 1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(InvalidArgument, match="this process is not in the group"):
        rendezvous_of(outside)
