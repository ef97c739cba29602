"""Every error that asyncdiff_core raises on purpose. All derive from :class:`CoreError`."""

from __future__ import annotations

import copyreg
from typing import Any


class CoreError(Exception):
    """Base class of all errors of asyncdiff_core."""


class InvalidArgument(CoreError, ValueError):
    """An argument that cannot be meant: a shape, a rank, a slot outside its range."""


class DeviceError(CoreError, RuntimeError):
    """A device that does not exist, or cannot do what is needed."""


class CudaError(CoreError, RuntimeError):
    """A call of the CUDA runtime failed."""


class NcclError(CoreError, RuntimeError):
    """NCCL, which GPUs of several hosts need, is missing or too old, or a call of it failed."""


class Aborted(CoreError, RuntimeError):
    """A rank aborted the fabric. ``rank`` says which (-1: unknown)."""

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


class AuthenticationError(CoreError, PermissionError):
    """Processes of a rendezvous do not know the same key."""


class ProcessError(CoreError, RuntimeError):
    """What processes have to do together did not come about because of one of them.

    ``process`` says which (-1: unknown), ``ranks`` what it runs. The fabric is over in all
    processes: close it; those that are left may make a new one.
    """

    def __init__(self, message: str, process: int = -1, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.process = process
        self.ranks = ranks

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.process, self.ranks)


class ProcessLost(ProcessError):
    """A process was killed, has crashed, or has closed the fabric while others still need it."""


class CollectiveTimeout(ProcessError, TimeoutError):
    """A process that lives did not make, in time, a call that it has to make with others."""


class IncidentError(CoreError, RuntimeError):
    """An operation of a rank on a channel went wrong.

    ``rank`` did ``operation`` ("begin", "push", "commit", "get" or "release") on ``slot`` of the
    channel named ``channel``; ``expected`` and ``seen`` are what it counted.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        channel: str,
        slot: int,
        expected: int,
        seen: int,
        operation: str,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.channel = channel
        self.slot = slot
        self.expected = expected
        self.seen = seen
        self.operation = operation

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled and copied without __init__, whose arguments are not all in args.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ExchangeTimeout(IncidentError):
    """A wait passed its deadline.

    ``peer`` is the rank that was waited for, ``straggler`` the one that it waited for in turn, and
    so on (the peer, where that waited for nobody; -1: unknown). ``expected`` and ``seen`` are
    epochs: the n-th bundle of a channel, from one, has epoch n.
    """

    def __init__(self, message: str, *, peer: int, straggler: int = -1, **incident: object) -> None:
        super().__init__(message, **incident)  # type: ignore[arg-type]
        self.peer = peer
        self.straggler = straggler


class SlotOrderError(IncidentError):
    """A slot or a call came out of turn.

    The n-th bundle of a channel, from zero, uses slot ``n % slots``; push and commit come after
    begin, release after get. ``expected`` is the slot that is next, ``seen`` the number of bundles
    so far; the message says which of both was wrong.
    """
