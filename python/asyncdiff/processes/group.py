"""What users call a group of processes: a store over which they meet, and who is who."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from asyncdiff_core.process_group import store_of

from ..errors import InputError

#: In place of a group: what torchrun, and launchers like it, say in the environment.
ENV = "env"
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Seconds more for who comes when the time is nearly over, and for torch to say that it is.
_LEAST = 1.0


@dataclass(frozen=True)
class Membership:
    """This process is ``process`` of ``processes``, which meet over a torch.distributed store."""

    store: Any
    process: int
    processes: int


class Patient:
    """A store in whose name a rendezvous waits for so many seconds, whatever its own timeout is."""

    def __init__(self, store: Any, seconds: float) -> None:
        self._store = store
        self.timeout = timedelta(seconds=seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def membership(group: Any, patience: float) -> Membership:
    """The membership that ``group`` means: a ProcessGroup, a DeviceMesh of one dimension, or "env".

    ``patience``: seconds to wait over the store, less those that the one of "env" took to come.
    Raises InputError for anything else, for a group that this process is not in, where the
    environment does not say who this is, and where its store does not come within ``patience``.
    """
    if not dist.is_available():
        raise InputError("this torch was built without torch.distributed, which groups need")
    if isinstance(group, str):
        if group != ENV:
            raise InputError(f"group={group!r}: write 'env', or pass a ProcessGroup")
        if not dist.is_initialized():
            return _of_environment(patience)
        group = dist.group.WORLD
    if hasattr(group, "get_group") and hasattr(group, "mesh_dim_names"):
        if group.ndim != 1:
            raise InputError(
                f"group is a DeviceMesh of {group.ndim} dimensions: pass one of them, mesh['name']"
            )
        group = group.get_group()
    if group == dist.GroupMember.NON_GROUP_MEMBER:  # a number, which new_group() gives outsiders
        raise InputError(
            "this process is not in the group: only those that are make a denoiser of it"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise InputError(
            f"group is a {type(group).__name__}: pass a ProcessGroup that this process is in "
            "(dist.group.WORLD, after init_process_group), a dimension of a DeviceMesh, or 'env'"
        )
    store = Patient(store_of(group), patience)
    return Membership(store, dist.get_rank(group), dist.get_world_size(group))


def _of_environment(patience: float) -> Membership:
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise InputError(
            f"group='env', but {', '.join(missing)} is not set: start the program with torchrun, "
            "or pass a ProcessGroup"
        )
    _check_rank(os.environ["RANK"], os.environ["WORLD_SIZE"])
    begun = time.monotonic()
    who = tuple(os.environ.get(n, "") for n in (*_VARIABLES, "TORCHELASTIC_RESTART_COUNT"))
    if who not in _met:
        _met[who] = _meet(patience)
    store, process, processes = _met[who]
    left = max(patience - (time.monotonic() - begun), min(patience, _LEAST))
    return Membership(Patient(store, round(left, 1) or left), process, processes)


def _check_rank(rank: str, size: str) -> None:
    try:
        sound = 0 <= int(rank) < int(size)
    except ValueError:
        sound = False
    if not sound:
        raise InputError(
            f"group='env', but RANK={rank} of WORLD_SIZE={size}: ranks are whole numbers from 0 "
            "on, below WORLD_SIZE"
        )


#: Stores by what the environment said: process 0 can listen on its port once.
_met: dict[tuple[str, ...], tuple[Any, int, int]] = {}


def _meet(patience: float) -> tuple[Any, int, int]:
    found: list[tuple[Any, int, int]] = []
    errors: list[Exception] = []
    until = time.monotonic() + patience
    try:
        if os.environ["RANK"] != "0":
            _listened_to(until)
        limit = timedelta(seconds=max(until - time.monotonic(), min(patience, _LEAST)))
    except (OSError, ValueError) as e:
        errors.append(e)
    else:
        # A server that is no store and does not answer ends no call of torch's.
        coming = threading.Thread(target=_come, args=(limit, found, errors), daemon=True)
        coming.start()
        coming.join(limit.total_seconds() + _LEAST)
    if found:
        return found[0]
    said = [f" ({type(e).__name__}: {str(e).partition(chr(10))[0]})" for e in errors]
    raise InputError(
        f"group='env': the store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
        f"is not there, or not all of {os.environ['WORLD_SIZE']} processes came within "
        f"{patience:g} s{''.join(said)}"
    ) from (errors[0] if errors else None)


def _listened_to(until: float) -> None:
    """Wait for somebody to listen where the store is to be: torch would for more than its limit.
    Raises OSError after it, and ValueError for what is no port."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not 0 < address[1] < 2**16:
        raise ValueError("ports are numbers from 1 to 65535")
    while True:
        try:
            socket.create_connection(address, max(until - time.monotonic(), 0.01)).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _come(limit: timedelta, found: list[tuple[Any, int, int]], errors: list[Exception]) -> None:
    try:
        found.append(next(iter(rendezvous("env://", timeout=limit))))
    except Exception as e:
        errors.append(e)
