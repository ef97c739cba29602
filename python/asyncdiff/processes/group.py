"""What users call a group of processes: a store over which they meet, and who is who."""

from __future__ import annotations

import os
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

    ``patience``: seconds to wait over the store, and for that of "env". Raises InputError for
    anything else, for a group that this process is not in, and where the environment does not say
    who this is.
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
    who = tuple(os.environ.get(n, "") for n in (*_VARIABLES, "TORCHELASTIC_RESTART_COUNT"))
    if who not in _met:
        _met[who] = _meet(patience)
    store, process, processes = _met[who]
    return Membership(Patient(store, patience), process, processes)


#: Stores by what the environment said: process 0 can listen on its port once.
_met: dict[tuple[str, ...], tuple[Any, int, int]] = {}


def _meet(patience: float) -> tuple[Any, int, int]:
    try:
        found: tuple[Any, int, int] = next(
            iter(rendezvous("env://", timeout=timedelta(seconds=patience)))
        )
        return found
    except (ValueError, RuntimeError) as e:
        raise InputError(
            f"group='env': the store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"is not there, or not all of {os.environ['WORLD_SIZE']} processes came within "
            f"{patience:g} s ({type(e).__name__}: {str(e).splitlines()[0]})"
        ) from e
