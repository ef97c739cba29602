"""The ways to move a bundle that are measured side by side, and where each of them can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .errors import BenchError
from .links.link import Make
from .machine import Machine


@dataclass(frozen=True)
class Way:
    """One way, by ``key``.

    ``missing`` says why it cannot run on a machine; ``make`` imports what it needs and returns what
    makes its links. ``distributed``: one process a GPU. ``joint``: both ends of a link have to be
    captured in one CUDA graph. ``least_slots``: the fewest that a link of it may have.
    """

    key: str
    title: str
    missing: Callable[[Machine], str | None]
    make: Callable[[], Make]
    distributed: bool = False
    joint: bool = False
    least_slots: int = 1
    #: Whether a link goes one way only, so that two directions cannot run at once.
    directed: bool = False


def known() -> dict[str, Way]:
    """All ways by key, asyncdiff's first."""
    return {w.key: w for w in _WAYS}


def find(keys: str | None) -> list[Way]:
    """``auto,memcpy`` as ways, all where None. Raises BenchError, with the known keys, for
    others."""
    ways = known()
    if keys is None:
        return list(ways.values())
    wanted = [k.strip() for k in keys.split(",")]
    for key in wanted:
        if key not in ways:
            raise BenchError(f"way {key!r} is unknown; known are {', '.join(ways)}")
    return [ways[k] for k in wanted]


def _on_any(machine: Machine) -> str | None:
    import asyncdiff_core

    if machine.cuda and not asyncdiff_core.cuda_built():
        return "asyncdiff_core was built without CUDA"
    return None


def _on_gpus(machine: Machine) -> str | None:
    return _on_any(machine) if machine.cuda else "needs a GPU: on the host all modes are one"


def _memcpy(machine: Machine) -> str | None:
    return None if machine.cuda else "needs a GPU"


def _nccl(machine: Machine) -> str | None:
    import torch.distributed as dist

    if not machine.cuda:
        return "needs a GPU"
    if machine.processes < 2:
        return "needs two GPUs: NCCL cannot put two ranks on one GPU"
    if not (dist.is_available() and dist.is_nccl_available()):
        return "this torch was built without NCCL"
    return None


def _hosts(machine: Machine) -> str | None:
    return _on_gpus(machine) or _nccl(machine)  # its process group, too


def _symmetric(machine: Machine) -> str | None:
    if not machine.cuda:
        return "needs a GPU"
    if machine.processes < 2:
        return "needs two GPUs: symmetric memory wants one for each process"
    try:
        from torch.distributed._symmetric_memory import empty, rendezvous  # noqa: F401
    except ImportError:
        return "this torch has no symmetric memory"
    return _nccl(machine)  # its process group


def _channel(mode: str) -> Callable[[], Make]:
    def make() -> Make:
        from .links import channels

        return channels.mode(mode)

    return make


def _push() -> Make:
    from .links.channels import PushLink

    return PushLink


def _memcpy_link() -> Make:
    from .links.memcpy import MemcpyLink

    return MemcpyLink


def _send_receive() -> Make:
    from .links.nccl import SendReceiveLink

    return SendReceiveLink


def _broadcast() -> Make:
    from .links.nccl import BroadcastLink

    return BroadcastLink


def _symmetric_link() -> Make:
    from .links.symmetric import SymmetricLink

    return SymmetricLink


_WAYS = (
    Way("auto", "asyncdiff", _on_any, _channel("auto"), least_slots=2),
    Way("inline", "asyncdiff, inline", _on_gpus, _channel("inline"), least_slots=2),
    Way("kernel", "asyncdiff, kernel", _on_gpus, _channel("kernel"), least_slots=2),
    Way("copy", "asyncdiff, copy", _on_gpus, _channel("copy"), least_slots=2),
    Way("push", "asyncdiff, tensor by tensor", _on_any, _push, least_slots=2),
    Way(
        "hosts", "asyncdiff, between hosts", _hosts, _channel("auto"), distributed=True,
        least_slots=2,
    ),
    Way("memcpy", "memcpy and event", _memcpy, _memcpy_link, joint=True),
    Way("nccl", "NCCL send/recv", _nccl, _send_receive, distributed=True),
    Way(
        "nccl-broadcast", "NCCL broadcast", _nccl, _broadcast, distributed=True, directed=True
    ),
    Way("symmetric", "symmetric memory", _symmetric, _symmetric_link, distributed=True),
)  # fmt: skip
