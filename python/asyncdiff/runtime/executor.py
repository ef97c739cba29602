"""Who issues the work of the ranks: one thread each on the CPU, the caller's thread on CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch

from ..errors import RankError


class Executor(Protocol):
    """Runs functions for ranks: in order for one rank, maybe at once for several."""

    def submit(self, rank: int, work: Callable[[], Any]) -> Future[Any]:
        """Issue ``work`` for ``rank``."""

    def close(self) -> None:
        """End the executor's threads, if any."""


class Inline:
    """The caller's thread issues everything, in the plan's order.

    On CUDA the ranks' streams run at once anyway, and this order never puts a wait before what it
    waits for, so that ranks that share a device cannot block each other's queue.
    """

    def submit(self, rank: int, work: Callable[[], Any]) -> Future[Any]:
        """Run ``work`` now."""
        future: Future[Any] = Future()
        try:
            future.set_result(work())
        except Exception as e:
            future.set_exception(e)
        return future

    def close(self) -> None:
        """Nothing to end."""


class Threads:
    """One thread a rank: CPU ranks compute at the same time."""

    def __init__(self, ranks: int) -> None:
        share = max(1, torch.get_num_threads() // ranks)
        self._pools = [
            ThreadPoolExecutor(
                1, f"asyncdiff-rank-{r}", initializer=torch.set_num_threads, initargs=(share,)
            )
            for r in range(ranks)
        ]

    def submit(self, rank: int, work: Callable[[], Any]) -> Future[Any]:
        """Queue ``work`` for the rank's thread."""
        return self._pools[rank].submit(work)

    def close(self) -> None:
        """End the threads once they are idle."""
        for pool in self._pools:
            pool.shutdown(wait=True)


class RankQueue:
    """Submits work for ranks and remembers it until it is known to have gone well."""

    def __init__(self, executor: Executor, on_failure: Callable[[int, str], None]) -> None:
        self._executor = executor
        self._on_failure = on_failure
        self._pending: list[tuple[int, Future[Any]]] = []

    def submit(self, rank: int, work: Callable[[], Any]) -> Future[Any]:
        """Issue ``work``; if it raises, ``on_failure(rank, reason)`` is called at once."""

        def guarded() -> Any:
            try:
                return work()
            except Exception as e:
                self._on_failure(rank, f"{type(e).__name__}: {e}")
                raise

        future = self._executor.submit(rank, guarded)
        self._pending.append((rank, future))
        return future

    def check(self, *, wait: bool = False) -> None:
        """Raise RankError for the first failure among what is done (``wait``: among all)."""
        done = [(r, f) for r, f in self._pending if wait or f.done()]
        failures = _failures(done)
        if failures and not wait:
            # The cause may still be on its way. After a failure nobody waits for long.
            done = self._pending
            failures = _failures(done)
        self._pending = [p for p in self._pending if p not in done]
        if failures:
            # Ranks that were waiting when another failed report an abort: not the cause.
            causes = [f for f in failures if type(f[1]).__name__ != "Aborted"] or failures
            rank, error = causes[0]
            raise RankError(
                rank,
                f"rank {rank} failed: {type(error).__name__}: {error}. The generation was stopped; "
                "the next one starts afresh",
            ) from error

    def settle(self) -> None:
        """Wait until nothing is running any more, whatever became of it."""
        for _, future in self._pending:
            with contextlib.suppress(Exception):
                future.result()
        self._pending = []

    def close(self) -> None:
        """End the executor."""
        self.settle()
        self._executor.close()


def _failures(work: list[tuple[int, Future[Any]]]) -> list[tuple[int, BaseException]]:
    """Ranks and errors of what failed, once all of it is done."""
    errors = ((rank, future.exception()) for rank, future in work)
    return [(rank, error) for rank, error in errors if error is not None]
