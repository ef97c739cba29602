"""Who issues the work of the ranks: one thread each on the CPU, the caller's thread on CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch

import asyncdiff_core as core

from ..errors import RankError
from ..processes.team import lost
from .devices import Place


class RankQueue:
    """Runs functions for this process's ranks: in order for one rank, at once for several where
    they have threads.

    ``threads``: one for each rank, with its share of torch's: CPU ranks compute at once. Without,
    as on CUDA, the caller's thread issues everything, in the plan's order. The ranks' streams run
    at once anyway, and this order never puts a wait before what it waits for, so that ranks that
    share a device cannot block each other's queue.

    ``on_failure`` is told (rank, reason) at once when a rank's work raised.
    """

    def __init__(
        self, ranks: Sequence[int], on_failure: Callable[[int, str], None], threads: bool
    ) -> None:
        self._on_failure = on_failure
        self._pools: dict[int, ThreadPoolExecutor] = {}
        #: work that is not known yet to have gone well
        self._pending: list[tuple[int, Future[Any]]] = []
        if not threads or not ranks:
            return
        count = torch.get_num_threads()
        share = max(1, count // len(ranks))
        self._pools = {r: ThreadPoolExecutor(1, f"asyncdiff-rank-{r}") for r in ranks}
        try:
            for started in [p.submit(_use_threads, share) for p in self._pools.values()]:
                started.result()
        finally:
            # A thread keeps the number that it set. Threads that begin later, the user's too, take
            # what any thread set last: that is again what it was.
            torch.set_num_threads(count)

    def submit(self, rank: int, work: Callable[..., Any], *args: Any) -> Any:
        """Issue ``work(*args)`` for ``rank``; :meth:`result` tells what it returned. Raises
        RankError where the caller's thread runs it."""
        if self._pools:
            future = self._pools[rank].submit(self._run, rank, work, args)
            self._pending.append((rank, future))
            return future
        try:
            return self._run(rank, work, args)
        except Exception as e:
            raise failure(rank, e) from e

    def result(self, submitted: Any) -> Any:
        """What the work returned that :meth:`submit` issued, waiting for it. Raises RankError."""
        if not isinstance(submitted, Future):
            return submitted
        if submitted.exception() is not None:
            self.check(wait=True)
        return submitted.result()

    def check(self, *, wait: bool = False) -> None:
        """Raise RankError for the first failure among what is done (``wait``: among all)."""
        left = []
        failed = False
        for rank, future in self._pending:
            if wait or future.done():
                failed = failed or future.exception() is not None
            else:
                left.append((rank, future))
        pending, self._pending = self._pending, [] if failed else left
        if failed:
            # The cause may still be on its way. After a failure nobody waits for long.
            errors = [(r, e) for r, f in pending if (e := f.exception()) is not None]
            # Ranks that were waiting when another failed report an abort: not the cause.
            causes = [f for f in errors if type(f[1]).__name__ != "Aborted"] or errors
            raise failure(*causes[0]) from causes[0][1]

    def wait(self) -> None:
        """Wait until nothing is running any more; what became of it is still to be known."""
        wait([future for _, future in self._pending])

    def settle(self) -> None:
        """Wait until nothing is running any more, whatever became of it."""
        for _, future in self._pending:
            with contextlib.suppress(Exception):
                future.result()
        self._pending = []

    def close(self) -> None:
        """End the threads, if any, once they are idle."""
        self.settle()
        for pool in self._pools.values():
            pool.shutdown(wait=True)

    def _run(self, rank: int, work: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        try:
            return work(*args)
        except Exception as e:
            if not isinstance(e, core.errors.ProcessError):  # which all are told anyway
                self._on_failure(rank, f"{type(e).__name__}: {e}")
            raise


def failure(rank: int, error: BaseException) -> RankError:
    """What a generation raises for a rank's error."""
    if isinstance(error, core.errors.ProcessError):
        return lost(error)
    cause = getattr(error, "rank", -1)
    if isinstance(error, core.Aborted) and cause not in (-1, rank):  # of another process
        return RankError(cause, f"{error}. The generation was stopped; the next one starts afresh")
    return RankError(
        rank,
        f"rank {rank} failed: {type(error).__name__}: {error}. The generation was stopped; the "
        "next one starts afresh",
    )


def blamed(error: core.CoreError, own: Container[int], places: Sequence[Place]) -> RankError:
    """The error of a rank that the core tells of; ``own``: the ranks of this process."""
    if isinstance(error, core.errors.ProcessError):
        return lost(error)
    rank, told = getattr(error, "rank", -1), str(error)
    if isinstance(error, core.ExchangeTimeout):
        late = error.peer if error.straggler < 0 else error.straggler
        if late not in own and late < len(places):
            rank, told = late, f"process {places[late].process} of the group: {told}"
    return RankError(rank, f"{told}. The generation was stopped; the next one starts afresh")


def _use_threads(count: int) -> None:
    """Have this thread compute with so many of torch's."""
    torch.get_num_threads()  # until a thread asked once, torch sets its number at the first work
    torch.set_num_threads(count)
