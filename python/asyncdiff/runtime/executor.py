"""Who issues the work of the ranks: one thread each on the CPU, the caller's thread on CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from ..errors import RankError

#: Told (rank, reason) at once when a rank's work raised.
OnFailure = Callable[[int, str], None]


class RankQueue(Protocol):
    """Runs functions for ranks: in order for one rank, maybe at once for several."""

    def submit(self, rank: int, work: Callable[..., Any], *args: Any) -> Any:
        """Issue ``work(*args)`` for ``rank``; :meth:`result` tells what it returned."""

    def result(self, submitted: Any) -> Any:
        """What the work returned that :meth:`submit` issued, waiting for it. Raises RankError."""

    def check(self, *, wait: bool = False) -> None:
        """Raise RankError for the first failure among what is done (``wait``: among all)."""

    def settle(self) -> None:
        """Wait until nothing is running any more, whatever became of it."""

    def close(self) -> None:
        """End the threads, if any."""


class InlineQueue:
    """The caller's thread issues everything, in the plan's order, for CUDA.

    The ranks' streams run at once anyway, and this order never puts a wait before what it waits
    for, so that ranks that share a device cannot block each other's queue.
    """

    def __init__(self, on_failure: OnFailure) -> None:
        self._on_failure = on_failure

    def submit(self, rank: int, work: Callable[..., Any], *args: Any) -> Any:
        """Run the work now; what it returns is the result. Raises RankError."""
        try:
            return work(*args)
        except Exception as e:
            self._on_failure(rank, f"{type(e).__name__}: {e}")
            raise failure(rank, e) from e

    def result(self, submitted: Any) -> Any:
        """See :class:`RankQueue`."""
        return submitted

    def check(self, *, wait: bool = False) -> None:
        """Nothing is ever under way."""

    def settle(self) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        """Nothing to end."""


class ThreadQueue:
    """One thread a rank: CPU ranks compute at once, each with its share of torch's threads."""

    def __init__(self, ranks: int, on_failure: OnFailure) -> None:
        threads = torch.get_num_threads()
        share = max(1, threads // ranks)
        self._pools = [ThreadPoolExecutor(1, f"asyncdiff-rank-{r}") for r in range(ranks)]
        try:
            for started in [p.submit(_use_threads, share) for p in self._pools]:
                started.result()
        finally:
            # A thread keeps the number that it set. Threads that begin later, the user's too, take
            # what any thread set last: that is again what it was.
            torch.set_num_threads(threads)
        self._on_failure = on_failure
        #: work that is not known yet to have gone well
        self._pending: list[tuple[int, Future[Any]]] = []

    def submit(self, rank: int, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Queue the work for the rank's thread."""
        future = self._pools[rank].submit(self._guarded, rank, work, args)
        self._pending.append((rank, future))
        return future

    def result(self, submitted: Future[Any]) -> Any:
        """See :class:`RankQueue`."""
        if submitted.exception() is not None:
            self.check(wait=True)
        return submitted.result()

    def check(self, *, wait: bool = False) -> None:
        """See :class:`RankQueue`."""
        done, left = [], []
        failed = False
        for rank, future in self._pending:
            if wait or future.done():
                done.append((rank, future))
                failed = failed or future.exception() is not None
            else:
                left.append((rank, future))
        if failed:
            # The cause may still be on its way. After a failure nobody waits for long.
            done, left = self._pending, []
        self._pending = left
        if failed:
            errors = [(r, e) for r, f in done if (e := f.exception()) is not None]
            # Ranks that were waiting when another failed report an abort: not the cause.
            causes = [f for f in errors if type(f[1]).__name__ != "Aborted"] or errors
            raise failure(*causes[0]) from causes[0][1]

    def settle(self) -> None:
        """See :class:`RankQueue`."""
        for _, future in self._pending:
            with contextlib.suppress(Exception):
                future.result()
        self._pending = []

    def close(self) -> None:
        """End the threads once they are idle."""
        self.settle()
        for pool in self._pools:
            pool.shutdown(wait=True)

    def _guarded(self, rank: int, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        try:
            return work(*args)
        except Exception as e:
            self._on_failure(rank, f"{type(e).__name__}: {e}")
            raise


def failure(rank: int, error: BaseException) -> RankError:
    """What a generation raises for a rank's error."""
    return RankError(
        rank,
        f"rank {rank} failed: {type(error).__name__}: {error}. The generation was stopped; the "
        "next one starts afresh",
    )


def _use_threads(count: int) -> None:
    """Have this thread compute with so many of torch's."""
    torch.get_num_threads()  # until a thread asked once, torch sets its number at the first work
    torch.set_num_threads(count)
