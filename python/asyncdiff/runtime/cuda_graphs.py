"""CUDA graphs: captured by torch, then made faster."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import asyncdiff_core as core

log = logging.getLogger("asyncdiff")


@dataclass
class Issued:
    """Work that was issued: what it left behind, and two events, None where nothing is pushed: the
    last computation is done; the boundary is delivered."""

    outputs: list[Any]
    computed: Any = None
    delivered: Any = None


class GraphCache:
    """A rank's CUDA graphs by what they do, over one pool of memory: recorded once, then replayed.

    Without a stream (on the CPU), and from the first work on that cannot be captured, work is
    issued as it is. Not thread-safe. Use it with the rank's device and ``stream`` current.
    """

    def __init__(self, rank: int, stream: torch.cuda.Stream | None) -> None:
        self.rank = rank
        self._stream = stream
        self._pool = None if stream is None else torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Issued]] = {}
        #: whether work is issued as graphs
        self.used = stream is not None

    def record(self, key: Hashable, work: Callable[[], Issued]) -> None:
        """Capture ``work``, if its graph is still missing and graphs are used."""
        if not self.used or key in self._graphs:
            return
        assert self._stream is not None
        try:
            with capturing(self._stream, self._pool) as graph:
                issued = work()
            self._graphs[key] = graph, issued
        except Exception as e:  # whatever the model does that a capture forbids
            self.used = False
            self._graphs.clear()
            log.warning(
                "rank %d runs without CUDA graphs, which is slower: %s", self.rank, reason(e)
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


def reason(e: Exception) -> str:
    """An error in a line of at most 300 characters."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


@contextlib.contextmanager
def capturing(stream: torch.cuda.Stream, pool: Any = None) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what is issued on ``stream`` within it, to be replayed afterwards.

    Other threads and devices may work on meanwhile. The graph's small memsets become kernels: the
    workspaces of matrix products and of attention are cleared by one each.
    """
    try:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        kept = True
    except TypeError:  # torch before 2.8 does not show its graphs
        graph = torch.cuda.CUDAGraph()
        kept = False
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        yield graph
    if kept:
        core.replace_memsets(graph.raw_cuda_graph(), stream.device.index)
        graph.instantiate()
