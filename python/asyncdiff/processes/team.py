"""What the processes of a denoiser do together. One process alone does the same, without others."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .. import errors
from ..errors import AsyncDiffError, MismatchError, ProcessError, RankError
from ..memory import out_of_memory
from .group import membership
from .meeting import Meeting

#: Deadlines that the first meeting may last: processes load their models before it.
_PATIENCE = 10
_T = TypeVar("_T")


class Team:
    """The processes that own a denoiser's ranks. All methods but :meth:`check` and :meth:`busy` are
    collective: every process calls them, in the same order.

    What is exchanged is plain data (JSON). Raise ProcessError, which names the process, where one
    has ended or does not come in time.
    """

    def __init__(self, meeting: Meeting | None = None) -> None:
        self.meeting = meeting
        #: this process, and how many there are
        self.process = 0 if meeting is None else meeting.process
        self.count = 1 if meeting is None else meeting.processes

    @classmethod
    def of(cls, group: Any, deadline: float) -> Team:
        """The processes of ``group`` (None: this one alone; else see
        :func:`~asyncdiff.processes.group.membership`), which wait ``deadline`` seconds for each
        other, and ten times as long to come together."""
        if group is None:
            return cls()
        patience = _PATIENCE * deadline
        return cls(Meeting(membership(group, patience), deadline, patience))

    @property
    def several(self) -> bool:
        """Whether there are other processes."""
        return self.count > 1

    def gather(self, what: str, mine: Any, last: bool = False) -> list[Any]:
        """Everybody's data, in order of process; ``last`` as in :meth:`Meeting.gather`."""
        if self.meeting is None:
            return [mine]
        return [json.loads(x) for x in self.meeting.gather(what, json.dumps(mine).encode(), last)]

    def together(
        self,
        what: str,
        work: Callable[[], Any],
        *,
        by: int | None = None,
        last: bool = False,
    ) -> list[Any]:
        """What ``work`` returned in every process (``by``: in this one alone; None of the others).

        Where it raises in one process, it raises in all: there what it raised, elsewhere the same
        kind of error, or ProcessError. Nobody goes on alone.
        """
        if self.meeting is None:
            return [work()]
        error: BaseException | None = None
        mine: Any = None
        try:
            if by is None or by == self.process:
                mine = work()
        except BaseException as e:
            error = e
        found = self.gather(what, [mine, _told(error)], last)
        if error is not None:
            raise error
        for process, (_, told) in enumerate(found):
            if told is not None:
                raise _raised(process, what, told)
        return [value for value, _ in found]

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
    def busy(self) -> Any:
        """Meanwhile the others wait longer than their deadline, as long as this process lives."""
        with contextlib.nullcontext() if self.meeting is None else self.meeting.busy():
            yield

    def about_to(self, what: str) -> contextlib.AbstractContextManager[None]:
        """What the core gathers meanwhile belongs to this."""
        return contextlib.nullcontext() if self.meeting is None else self.meeting.about_to(what)

    def check(self) -> None:
        """Raise ProcessError where another process is known to have ended."""
        if self.meeting is not None:
            self.meeting.check()

    def close(self) -> None:
        """Do nothing together any more."""
        if self.meeting is not None:
            self.meeting.close()


def _told(error: BaseException | None) -> list[Any] | None:
    """What others are told of an error."""
    if error is None:
        return None
    text = str(error) if isinstance(error, AsyncDiffError) else f"{type(error).__name__}: {error}"
    return [type(error).__name__, text, out_of_memory(error)]


def _raised(process: int, what: str, told: list[Any]) -> Exception:
    """What is raised here for an error of another process: one of ours is the same kind here."""
    name, text, memory = told
    kind = getattr(errors, name, None)
    if (
        isinstance(kind, type)
        and issubclass(kind, AsyncDiffError)
        and not issubclass(kind, (RankError, MismatchError))
    ):
        same: Exception = kind(f"{text} (said by process {process} of the group)")
        return same
    return ProcessError(process, f"process {process} could not {what}: {text}", memory)


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
