"""What the processes of a denoiser do together. One process alone does the same, without others."""

from __future__ import annotations

import atexit
import contextlib
import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import asyncdiff_core as core

from .. import errors
from ..environment import prepare_deadline
from ..errors import (
    AsyncDiffError,
    DeviceError,
    InputError,
    MismatchError,
    ProcessError,
    RankError,
)
from ..memory import out_of_memory
from ..progress import watched
from .group import membership

#: Deadlines that coming together may last: processes load their models before.
_PATIENCE = 10
#: What differs where processes do not make the same call.
_CALL = "the call"
_T = TypeVar("_T")


class Team:
    """The processes that own a denoiser's ranks. All methods but :meth:`check` and :meth:`busy` are
    collective: every process calls them, in the same order.

    What is exchanged is plain data (JSON), through shared memory or, between hosts, connections of
    the core's; a process that ends is noticed at once. Raise ProcessError, which names the process,
    where one has ended or does not come in time; from then on nothing is done together any more.
    """

    def __init__(
        self,
        fabric: core.HostFabric | None = None,
        process: int = 0,
        first_only: bool = False,
        patience: float | None = None,
    ) -> None:
        self._fabric = fabric
        #: seconds that a process which has much to do is waited for while it says nothing; None: as
        #: long as for anything
        self._patience = patience
        #: whether only process 0 gets noise predictions, of several
        self.first_only = first_only
        #: this process, and how many there are
        self.process = process
        self.count = 1 if fabric is None else fabric.ranks
        #: the number of each process's host, from 0
        self.hosts = (0,) if fabric is None else fabric.hosts
        self._busy = 0
        self._closed = False

    @classmethod
    def of(cls, group: Any, deadline: float, results: str = "all") -> Team:
        """The processes of ``group`` (None: this one alone; else see
        :func:`~asyncdiff.processes.group.membership`), which wait ``deadline`` seconds for each
        other, and ten times as long to come together; one that is :meth:`busy` and says nothing of
        going on they wait for as long as ``ASYNCDIFF_PREPARE_DEADLINE`` says. ``results``: who gets
        noise predictions, "all" or "first". Raises InputError for other ``results`` and for what
        that variable cannot mean, DeviceError for processes that cannot exchange."""
        if results not in ("all", "first"):
            raise InputError(f"results={results!r}: write 'all' or 'first'")
        if group is None:
            return cls()
        patience, busy = _PATIENCE * deadline, max(deadline, prepare_deadline())
        member = membership(group, patience)
        try:
            meeting = core.StoreRendezvous(member.store, member.process, member.processes)
            # Of words alone: what is simulated is the way of bundles.
            fabric = core.HostFabric(
                member.processes, deadline=deadline, rendezvous=meeting, link="off"
            )
        except core.InvalidArgument as e:
            raise DeviceError(f"the processes of the group cannot exchange: {e}") from e
        except core.errors.ProcessError as e:
            raise lost(e) from e
        only = results == "first" and member.processes > 1
        team = cls(fabric, member.process, only, busy)
        # Who ends in good order is missed by those only that still need it.
        atexit.register(_close, weakref.ref(team))
        return team

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.count > 1

    def all_gather(self, mine: bytes) -> list[bytes]:
        """Everybody's bytes, in order of process."""
        if self._fabric is None:
            return [mine]
        with self.collective():
            timeout = self._patience if self._busy else None
            return self._fabric.all_gather(mine, timeout=timeout)

    @property
    def processes(self) -> int:
        """How many there are: with this, a team is a rendezvous of asyncdiff_core."""
        return self.count

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """Around calls of the core that processes make together: its errors become ours."""
        if self._closed:
            raise ProcessError(self.process, "this denoiser is closed")
        try:
            yield
        except core.errors.ProcessError as e:
            raise lost(e) from e

    def gather(self, what: str, mine: Any) -> list[Any]:
        """Everybody's data for ``what``, in order of process. Raises MismatchError where one is
        about to do something else."""
        if self._fabric is None:
            return [mine]
        found = [json.loads(x) for x in self.all_gather(json.dumps([what, mine]).encode())]
        for process, (theirs, _) in enumerate(found):
            if theirs != what:
                raise MismatchError(
                    process,
                    _CALL,
                    f"processes make different calls: process {process} is about to {theirs}, "
                    f"process {self.process} to {what}. All processes of a group make the same "
                    "calls in the same order",
                )
        return [value for _, value in found]

    def together(
        self,
        what: str,
        work: Callable[[], Any],
        *,
        by: int | None = None,
    ) -> list[Any]:
        """What ``work`` returned in every process (``by``: in this one alone; None of the others).

        Where it raises in one process, it raises in all: there what it raised, elsewhere the same
        kind of error, or ProcessError. Nobody goes on alone, nor where errors differ: one of ours,
        after which there may be another way, is raised only where no process has another one.
        """
        if self._fabric is None:
            return [work()]
        error: BaseException | None = None
        mine: Any = None
        try:
            if by is None or by == self.process:
                mine = work()
        except BaseException as e:
            error = e
        found = self.gather(what, [mine, _told(error)])
        failed = [(process, told) for process, (_, told) in enumerate(found) if told is not None]
        if not failed:
            return [value for value, _ in found]
        process, told = min(failed, key=lambda of: _kind(of[1]) is not None)
        own = _told(error)
        if error is not None and own is not None and _kind(own) in (None, _kind(told)):
            raise error
        raise _raised(process, what, told) from error

    def by(self, process: int, what: str, work: Callable[[], _T]) -> _T:
        """What ``work`` returns in one process, for all of them."""
        return self.together(what, work, by=process)[process if self.several else 0]

    def every(self, what: str, work: Callable[[], bool]) -> bool:
        """Whether ``work`` returns true everywhere."""
        return all(self.together(what, work))

    def agree(self, what: str, values: Callable[[], Mapping[str, str]]) -> None:
        """Make sure that all processes have the same values by name. Raises MismatchError for the
        first that differs from process 0's, in all of them."""
        if not self.several:
            return
        first, *others = self.together(what, lambda: list(values().items()))
        for process, theirs in enumerate(others, start=1):
            for (name, value), (other_name, other) in zip(first, theirs, strict=False):
                if (name, value) != (other_name, other):
                    raise _differs(process, name, value, other)
            if len(first) != len(theirs):
                longer = max(first, theirs, key=len)
                raise _differs(process, longer[min(len(first), len(theirs))][0], "", "")

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Around what takes long in all processes, maybe in some longer than in others: they are
        waited for as long as they live, are not stopped, and say from time to time that they go on
        (:func:`~asyncdiff.progress.heartbeat`, which all that is told of progress is)."""
        self._busy += 1
        try:
            with watched(self._beat):
                yield
        finally:
            self._busy -= 1

    def _beat(self, doing: str) -> None:
        if self._fabric is not None and not self._closed:
            self._fabric.heartbeat(doing)

    def check(self) -> None:
        """Raise ProcessError where another process is known to have ended, without waiting."""
        if self._fabric is not None and not self._closed:
            with self.collective():
                self._fabric.check()

    def close(self) -> None:
        """Do nothing together any more. Not collective."""
        if self._fabric is not None and not self._closed:
            self._closed = True
            self._fabric.close()


def _close(team: weakref.ref[Team]) -> None:
    mine = team()
    if mine is not None:
        mine.close()


def lost(error: core.errors.ProcessError) -> ProcessError:
    """What the core says of a process, as an error of ours."""
    process = error.process
    name = f"process {process} of the group" if process >= 0 else "a process of the group"
    kind = "has ended" if isinstance(error, core.ProcessLost) else "did not come"
    return ProcessError(
        process,
        f"{name} {kind}: {error}. Close this denoiser; another group, of the processes that are "
        "left or of new ones, works",
    )


def _told(error: BaseException | None) -> list[Any] | None:
    """What others are told of an error."""
    if error is None:
        return None
    text = str(error) if isinstance(error, AsyncDiffError) else f"{type(error).__name__}: {error}"
    return [type(error).__name__, text, out_of_memory(error)]


def _raised(process: int, what: str, told: list[Any]) -> Exception:
    """What is raised here for an error of another process: one of ours is the same kind here."""
    _, text, memory = told
    kind = _kind(told)
    if kind is not None:
        return kind(f"{text} (said by process {process} of the group)")
    return ProcessError(process, f"process {process} could not {what}: {text}", memory)


def _kind(told: list[Any]) -> type[AsyncDiffError] | None:
    """The kind of an error that is raised in all processes alike; None for others."""
    kind = getattr(errors, told[0], None)
    if not (isinstance(kind, type) and issubclass(kind, AsyncDiffError)):
        return None
    return None if issubclass(kind, (RankError, MismatchError)) else kind


def _differs(process: int, name: str, first: str, other: str) -> MismatchError:
    seen = f" ({_short(first)} in process 0, {_short(other)} in process {process})"
    return MismatchError(
        process,
        name,
        f"{name} differs in process {process} of the group from process 0's"
        f"{'' if _is_digest(first) else seen}: every process of a group has to be given the same",
    )


#: How digests begin, which say nothing to a reader.
DIGEST = "#"


def _is_digest(value: str) -> bool:
    return not value or value.startswith(DIGEST)


def _short(value: str) -> str:
    return value if len(value) <= 200 else value[:200] + "…"
