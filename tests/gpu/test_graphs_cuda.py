"""Memsets of captured graphs become kernels that do the same."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

import asyncdiff_core as core
from asyncdiff.runtime.cuda_graphs import capturing

# bytes before the memory that is set, bytes set, value
CASES = [(0, 4, 0), (0, 1 << 16, 7), (1, 37, 255), (16, 4096, 1), (3, 1, 9), (0, (1 << 20) + 4, 5)]


@pytest.fixture(scope="module")
def memset() -> Any:
    cuda = ctypes.CDLL("libcuda.so.1")

    def call(at: int, value: int, nbytes: int, stream: int) -> None:
        arguments = (ctypes.c_uint64(at), ctypes.c_ubyte(value), ctypes.c_size_t(nbytes))
        assert cuda.cuMemsetD8Async(*arguments, ctypes.c_void_p(stream)) == 0

    return call


def test_a_graph_without_memsets_does_what_it_did_on_one_gpu(memset: Any) -> None:
    stream = torch.cuda.Stream()
    memory = [
        torch.zeros(begin + nbytes + 16, dtype=torch.uint8, device="cuda")
        for begin, nbytes, _ in CASES
    ]
    want = [m.clone() for m in memory]
    with capturing(stream) as graph:
        for m in memory:
            m.fill_(100)  # kernels before and after each memset: their order counts
        for m, (begin, nbytes, value) in zip(memory, CASES, strict=True):
            memset(m.data_ptr() + begin, value, nbytes, stream.cuda_stream)
        for m in memory:
            m.add_(1)
    for w, (begin, nbytes, value) in zip(want, CASES, strict=True):
        w.fill_(101)
        w[begin : begin + nbytes] = (value + 1) % 256
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for m, w in zip(memory, want, strict=True):
        assert torch.equal(m, w)


def test_small_memsets_are_replaced_on_one_gpu(memset: Any) -> None:
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    stream = torch.cuda.Stream()
    memory = torch.zeros(2 << 20, dtype=torch.uint8, device="cuda")
    with torch.cuda.graph(graph, stream=stream):
        memset(memory.data_ptr(), 1, 1 << 10, stream.cuda_stream)
        memset(memory.data_ptr(), 1, 2 << 20, stream.cuda_stream)
    assert core.replace_memsets(graph.raw_cuda_graph(), 0) == 1
    assert core.replace_memsets(graph.raw_cuda_graph(), 0) == 0
    graph.instantiate()
    graph.replay()
    torch.cuda.synchronize()
    assert bool((memory == 1).all())


def test_a_handle_that_is_no_graph_is_an_error_on_one_gpu() -> None:
    with pytest.raises(core.CudaError, match="reading a graph"):
        core.replace_memsets(0, 0)
    with pytest.raises(core.CudaError, match="uploading a graph"):
        core.upload_graph(0, 0)
