"""CUDA graphs: captured by torch, then made faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

import asyncdiff_core as core


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
