"""Every error that asyncdiff raises on purpose. All derive from :class:`AsyncDiffError`."""

from __future__ import annotations

from typing import Any

from asyncdiff_core import errors as core


class AsyncDiffError(Exception):
    """Base class of all errors raised by asyncdiff."""


class PlanError(AsyncDiffError, ValueError):
    """A plan cannot be built from these numbers, or a plan read from text is not consistent."""


class PartitionError(AsyncDiffError, ValueError):
    """The denoiser cannot be split as asked."""


class MemoryLimitError(PartitionError):
    """No cut of the denoiser fits into the memory that its components may take; the message says
    how much each would need."""


class TokensError(PartitionError):
    """The denoiser's tokens cannot be shared out among ranks; the message says at what it ends."""


class CaptureError(AsyncDiffError, RuntimeError):
    """The denoiser cannot be exported; the exporter's reason is part of the message."""


class DeviceError(AsyncDiffError, core.DeviceError, ValueError):
    """The list of devices does not fit the plan or the machine, or a device cannot do what is
    needed. It is an ``asyncdiff_core.DeviceError`` too, and stands for it: what the core says of a
    device reaches users of this package as this one."""


class InputError(AsyncDiffError, ValueError):
    """A denoiser was called with inputs that it was not prepared for."""


class BatchError(InputError):
    """The parts of a batch cannot be computed by themselves, as the settings ask for."""


class SchedulerError(AsyncDiffError, ValueError):
    """The sampler calls the denoiser in a way that asynchronous denoising cannot serve."""


class MetricError(AsyncDiffError, RuntimeError):
    """A measure of pictures cannot be computed here; the message says what is missing."""


class TuneError(AsyncDiffError, ValueError):
    """No setting that was tried keeps what was asked for; the message names the best."""


class RankError(AsyncDiffError, RuntimeError):
    """A rank failed in the middle of a generation. ``rank`` says which; ``__cause__`` says why."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:
        # args alone, which pickle and copy would call __init__ with, lack the rank.
        return type(self), (self.rank, *self.args), self.__dict__


class ProcessError(RankError):
    """Another process of the group has ended, does not come, or could not do its part. ``rank`` is
    its rank in the group. What this process holds is sound: ``close()`` it, and make another group
    and another denoiser."""

    def __init__(self, rank: int, message: str, memory: bool = False) -> None:
        super().__init__(rank, message)
        #: whether it was memory that the other process lacked
        self.memory = memory


class MismatchError(AsyncDiffError, ValueError):
    """The processes of a group were given different things. ``rank`` is the first one in the group
    that differs from rank 0, ``what`` the name of what differs."""

    def __init__(self, rank: int, what: str, message: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rank, self.what, *self.args), self.__dict__


def reason(e: BaseException) -> str:
    """An error in a line of at most 300 characters."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
