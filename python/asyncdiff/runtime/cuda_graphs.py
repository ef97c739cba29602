"""CUDA graphs: captured by torch, then made faster."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import asyncdiff_core as core

from ..errors import reason
from ..memory import out_of_memory
from ..progress import heartbeat

log = logging.getLogger("asyncdiff")

#: How often a rank's work is found not to be capturable before that is believed for good.
_TRIES = 2
#: What CUDA says of work that no capture allows (cudaErrorStreamCapture…, 900 to 908), and torch,
#: which looks first.
_FORBIDDEN = (
    "cudaErrorStreamCapture",
    "stream is capturing",
    "previous error during capture",
    "merge of separate capture sequences",
    "capture was not ended in the same stream",
    "capturing stream has unjoined work",
    "dependency created on uncaptured work",
    "depend on a capturing blocking stream",
    "last recorded in a capturing stream",
    "terminate a thread-local capture sequence",
    "graph capture",
    "not in capture mode",
)
#: That it was not the operation that ended the capture which said so.
_INVALIDATED = "previous error during capture"


class NotCapturable(Exception):
    """Work cannot be captured; ``__cause__`` is what CUDA or torch said. Nothing is wrong with it:
    without a capture it runs."""


@dataclass
class Issued:
    """Work that was issued: what it left behind, and two events, None where nothing is pushed: the
    last computation is done; the boundary is delivered."""

    outputs: list[Any]
    computed: Any = None
    delivered: Any = None


class GraphCache:
    """A rank's CUDA graphs by what they do, over one pool of memory: recorded once, then replayed.

    Without a stream (on the CPU), and from the first work on that no capture allows, work is issued
    as it is, until :meth:`try_again`. Not thread-safe. Use it with the rank's device and ``stream``
    current.
    """

    def __init__(self, rank: int, stream: torch.cuda.Stream | None) -> None:
        self.rank = rank
        self._stream = stream
        self._pool = None if stream is None else torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Issued]] = {}
        #: whether work is issued as graphs
        self.used = stream is not None
        self._refused = 0

    def try_again(self) -> None:
        """Use graphs again, if a capture was forbidden once only: it may have been because of what
        another thread did, or of what was not loaded yet."""
        self.used = self.used or 0 < self._refused < _TRIES

    def record(self, key: Hashable, work: Callable[[], Issued]) -> None:
        """Capture ``work``, if its graph is still missing and graphs are used. Raises what the work
        raises, a lack of memory too, but not that no capture allows it."""
        if not self.used or key in self._graphs:
            return
        assert self._stream is not None
        try:
            with capturing(self._stream, self._pool) as graph:
                issued = work()
            self._graphs[key] = graph, issued
        except NotCapturable as e:
            # Where CUDA ended the capture, torch's allocator may refuse another one on its pool.
            self._pool = torch.cuda.graph_pool_handle()
            self.used = False
            self._graphs.clear()
            self._refused += 1
            log.log(
                logging.WARNING if self._refused == 1 else logging.DEBUG,
                "rank %d runs without CUDA graphs, which is slower: %s",
                self.rank,
                reason(e.__cause__ or e),
            )

    def issue(self, key: Hashable, work: Callable[[], Issued]) -> Issued:
        """Issue ``work``: replay its graph, recorded now if need be, or run it. The outputs of a
        graph are valid until it is replayed."""
        if self.used:
            self.record(key, work)
        if not self.used:
            return work()
        graph, issued = self._graphs[key]
        graph.replay()
        return issued

    def clear(self) -> None:
        """Drop all graphs. Call when idle."""
        self._graphs.clear()


@contextlib.contextmanager
def capturing(stream: torch.cuda.Stream, pool: Any = None) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what is issued on ``stream`` within it, to be replayed afterwards.

    Other threads and devices may work on meanwhile. The graph's small memsets become kernels: the
    workspaces of matrix products and of attention are cleared by one each. It lies on its device
    already, so that its first replay allocates nothing.

    Raises NotCapturable where CUDA or torch says that a capture forbids what was issued, else what
    was raised within it.
    """
    heartbeat("recording a CUDA graph")
    try:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        kept = True
    except TypeError:  # torch before 2.8 does not show its graphs
        graph = torch.cuda.CUDAGraph()
        kept = False
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    first: BaseException | None = None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                yield graph
            except BaseException as e:
                first = e
                raise
    except BaseException as e:
        _end(stream, pool)
        # Ending a capture that went wrong fails too, and would hide why.
        if _forbidden(first or e, e):
            raise NotCapturable from first or e
        raise (first or e) from None
    if kept:
        core.replace_memsets(graph.raw_cuda_graph(), stream.device.index)
        graph.instantiate()
        if hasattr(graph, "raw_cuda_graph_exec"):  # older torch does not show it
            core.upload_graph(graph.raw_cuda_graph_exec(), stream.device.index)


@contextlib.contextmanager
def on_stream(device: torch.device, stream: torch.cuda.Stream) -> Iterator[None]:
    """Makes both the current ones, without gradients."""
    with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):
        yield


def _forbidden(first: BaseException, last: BaseException) -> bool:
    """Whether a capture failed because it was one: ``first`` is what was raised within it, ``last``
    what came of ending it, which may be the same."""
    if not isinstance(first, RuntimeError) or out_of_memory(first):
        return False
    if any(said in str(first) for said in _FORBIDDEN):
        return True
    # A library that CUDA refused something to says so in words of its own.
    invalidated = last is not first and _INVALIDATED in str(last)
    return invalidated and not isinstance(first, core.CoreError)


def _end(stream: torch.cuda.Stream, pool: Any) -> None:
    """Have torch's allocator forget a capture that could not be ended: it would take all that comes
    for a part of it, and refuse the next capture."""
    with contextlib.suppress(Exception):  # where it was ended, and before torch had these
        torch._C._cuda_endAllocateToPool(stream.device.index, pool)
        torch._C._cuda_releasePool(stream.device.index, pool)
