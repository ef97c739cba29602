"""What is made of captures that fail: only where CUDA says that a capture is not allowed is work
issued without one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import asyncdiff_core as core
from asyncdiff.memory import out_of_memory
from asyncdiff.processes.team import Team
from asyncdiff.runtime import cuda_graphs
from asyncdiff.runtime.cuda_graphs import GraphCache, Issued
from asyncdiff.runtime.cutting import rebalance
from asyncdiff.runtime.devices import Place


class Stream:
    device = torch.device("cuda", 0)


class Graph:
    def __init__(self, **options: bool) -> None:
        self.replays = 0

    def raw_cuda_graph(self) -> int:
        return 0

    def instantiate(self) -> None:
        pass

    def replay(self) -> None:
        self.replays += 1


#: what ending a capture raises that went wrong within
INVALIDATED = RuntimeError("CUDA error: operation failed due to a previous error during capture")
UNJOINED = RuntimeError("CUDA error: capturing stream has unjoined work")
LEFT = RuntimeError("CUDA error: operation not permitted when stream is capturing")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[BaseException | None]:
    """Captures on the CPU; what is put in this list is raised at their ends, one after another."""
    ends: list[BaseException | None] = []

    @contextlib.contextmanager
    def capture(*args: Any, **options: Any) -> Iterator[None]:
        try:
            yield
        finally:
            error = ends.pop(0) if ends else None
            if error is not None:
                raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(core, "replace_memsets", lambda *_: 0)
    monkeypatch.setattr(core, "upload_graph", lambda *_: None)
    return ends


def cache() -> GraphCache:
    return GraphCache(0, Stream())  # type: ignore[arg-type]


def work(*errors: BaseException) -> Any:
    """Work that raises these errors, one each time, and then does well."""
    left = list(errors)

    def issue() -> Issued:
        if left:
            raise left.pop(0)
        return Issued([1])

    return issue


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (LEFT, INVALIDATED),
        (RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture"), None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), INVALIDATED),
        (core.CudaError("copying: cudaErrorStreamCaptureUnsupported (no)"), INVALIDATED),
    ],
)
def test_what_no_capture_allows_is_issued_as_it_is(
    ends: list[BaseException | None],
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    end: BaseException | None,
) -> None:
    graphs = cache()
    ends.append(end)
    with caplog.at_level(logging.WARNING, "asyncdiff"):
        assert graphs.issue("run", work(error)).outputs == [1]
    assert not graphs.used
    (said,) = caplog.records
    assert " ".join(str(error).split())[:40] in said.getMessage()


@pytest.mark.parametrize("end", [None, INVALIDATED, UNJOINED])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("CUDA error: out of memory"),
        core.CudaError("allocating 8 bytes on CUDA device 0: cudaErrorMemoryAllocation (…)"),
        TypeError("a mistake"),
        KeyboardInterrupt(),
    ],
)
def test_other_failures_are_raised_as_they_were(
    ends: list[BaseException | None],
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    end: BaseException | None,
) -> None:
    graphs = cache()
    ends.append(end)
    with pytest.raises(type(error)) as raised:
        graphs.record("run", work(error))
    assert raised.value is error
    assert graphs.used and not caplog.records
    assert graphs.issue("run", work()).outputs == [1]


def test_a_mistake_in_the_middle_of_a_push_is_raised(ends: list[BaseException | None]) -> None:
    error = RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
    ends.append(UNJOINED)
    with pytest.raises(RuntimeError) as raised:
        cache().record("run", work(error))
    assert raised.value is error


def test_a_capture_is_tried_again_once_and_said_once(
    ends: list[BaseException | None], caplog: pytest.LogCaptureFixture
) -> None:
    graphs = cache()
    with caplog.at_level(logging.WARNING, "asyncdiff"):
        graphs.record("run", work(LEFT))
        graphs.try_again()
        assert graphs.used
        graphs.record("run", work())
        assert graphs.used
        graphs.record("other", work(LEFT))
        graphs.try_again()
    assert not graphs.used  # it was tried often enough
    assert len(caplog.records) == 1
    without = GraphCache(0, None)
    without.try_again()
    assert not without.used


def test_lack_of_memory_is_known_by_what_caused_an_error() -> None:
    error = ValueError("rank 1 failed")
    assert not out_of_memory(error) and not out_of_memory(ValueError("out of memory"))
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert out_of_memory(error)
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))


@pytest.mark.parametrize("error", [LEFT, torch.OutOfMemoryError("no"), TypeError("a mistake")])
def test_components_are_not_timed_where_that_cannot_be_and_mistakes_are_raised(
    ends: list[BaseException | None], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    class Worker:
        rank = 0
        device = torch.device("cuda", 0)
        stream = Stream()
        current = staticmethod(contextlib.nullcontext)

    class Engine:
        cuda = True
        team = Team()
        places = (Place.here(Worker.device),)
        workers = (Worker(),)
        partition = type("Partition", (), {"components": [0]})

        def graph_alone(self, worker: Worker) -> None:
            with cuda_graphs.capturing(worker.stream):  # type: ignore[arg-type]
                raise error

        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(rebalance, "_fill", lambda worker: None)
    engine: Any = Engine()
    if isinstance(error, TypeError):
        with pytest.raises(TypeError):
            rebalance.component_ms(engine)
    else:
        assert rebalance.component_ms(engine) is None
