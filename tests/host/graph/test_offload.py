"""Weights that go to host memory while ranks are made of them."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser
from asyncdiff.graph.offload import Offload, copy_to_host, dense, stages_of, weights_of
from asyncdiff.graph.weights import Weights


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Denoisers leave home as if that were a GPU with room; nothing is copied before this is
    set."""
    go_on, copy = threading.Event(), Offload._copy

    def late(self: Offload) -> None:
        go_on.wait(60)
        copy(self)

    made = Weights.__init__

    def leaves(self: Weights, *args: Any) -> None:
        made(self, *args)
        self._leaves = True

    monkeypatch.setattr(Weights, "__init__", leaves)
    monkeypatch.setattr(Offload, "_copy", late)
    yield go_on
    go_on.set()


def test_ranks_take_weights_from_where_they_were(
    slowly: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, call = toy(), toy_call(2)
    want, values = module(**call), {n: w.clone() for n, w in module.state_dict().items()}
    places = {id(w): w.data_ptr() for w in weights_of(module)}
    finish, finishes = Offload.finish, list[int]()

    def finished(self: Offload) -> None:
        finishes.append(1)
        assert all(w.data_ptr() != places[id(w)] for w in weights_of(module))
        slowly.set()
        finish(self)

    monkeypatch.setattr(Offload, "finish", finished)
    denoiser = AsyncDenoiser(module, components=2, devices=["cpu"] * 2)
    with contextlib.closing(denoiser):
        for _ in range(2):
            with denoiser.generation([0.5]):
                torch.testing.assert_close(denoiser(**call), want)
            assert all(torch.equal(w, values[n]) for n, w in module.state_dict().items())
        assert finishes == [1]
        with torch.no_grad():  # ranks do not share what the module has now
            for weight in module.parameters():
                weight.mul_(2)
        with denoiser.generation([0.5]):
            torch.testing.assert_close(denoiser(**call), module(**call))


def test_without_memory_for_both_the_denoiser_leaves_first(
    slowly: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly.set()
    module, call = toy(), toy_call(2)
    get, failed = Weights.get, list[str]()

    def short(self: Weights, captured: object, name: str, device: torch.device) -> object:
        if self._leaving is not None:
            failed.append(name)
            raise torch.OutOfMemoryError("none is left")
        return get(self, captured, name, device)  # type: ignore[arg-type]

    monkeypatch.setattr(Weights, "get", short)
    denoiser = AsyncDenoiser(module, components=2, devices=["cpu"] * 2)
    with contextlib.closing(denoiser), denoiser.generation([0.5]):
        torch.testing.assert_close(denoiser(**call), module(**call))
    assert failed


def test_where_copying_fails_weights_stay() -> None:
    weights = [torch.randn(4), torch.randn(3)]
    places = [w.data_ptr() for w in weights]
    leaving = Offload(weights)
    leaving._thread.join()
    leaving._failed = MemoryError("the host has none left")
    with pytest.raises(MemoryError, match="none left"):
        leaving.finish()
    assert [w.data_ptr() for w in weights] == places


@pytest.mark.parametrize("stage", [1, 7, 64, 1000, 1 << 20])
def test_all_kinds_of_memory_arrive(stage: int) -> None:
    """Whatever fits into a buffer, and wherever a buffer ends."""
    rows = torch.randn(6, 5)
    originals = [
        torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        torch.randn(7).half(),
        torch.tensor(3.5, dtype=torch.float64),
        torch.arange(11, dtype=torch.int8),
        rows.t(),
        torch.randn(1, 4, 1).bfloat16(),
        torch.randn(2, 3) > 0,
        rows[2:3, 1],  # one element, whose stride means nothing
        rows.as_strided((1, 1), (7, 9)),
        rows.as_strided((5, 1, 6), (6, 100, 1)),
        torch.randn(3, dtype=torch.complex64),
    ]
    hosts = [torch.empty_like(x) for x in originals]
    assert all(map(dense, originals))
    copy_to_host(stages_of(zip(hosts, originals, strict=True), stage), contextlib.nullcontext)
    for host, original in zip(hosts, originals, strict=True):
        assert host.stride() == original.stride() and torch.equal(host, original)
    assert not any(map(dense, (rows[:, :3], rows[::2], rows.expand(2, 6, 5), rows[:0])))


class Calls(TorchFunctionMode):
    """Counts calls of torch, after each of which a thread waits for the interpreter."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return call(*args, **(kwargs or {}))


def test_the_thread_calls_torch_by_buffer_not_by_weight() -> None:
    pairs = [(torch.empty(8), torch.full((8,), float(i))) for i in range(200)]
    stages = stages_of(pairs, 32 * 100)
    with Calls() as calls:
        copy_to_host(stages, contextlib.nullcontext)
    assert len(stages) == 2 and calls.count <= 10 * len(stages)
    assert all(torch.equal(host, original) for host, original in pairs)


def test_weights_that_are_not_just_memory_are_copied_by_themselves() -> None:
    whole = torch.randn(6, 5)
    turned = torch.randn(4, dtype=torch.complex64).conj()
    negated = torch._neg_view(torch.randn(5))
    weights = [whole[:, :3], torch.randn(4), torch.randn(0, 3), turned, negated]
    want = [w.clone() for w in weights]
    leaving = Offload(weights)
    leaving.finish()
    for weight, value in zip(weights, want, strict=True):
        assert torch.equal(weight, value)


def test_where_weights_were_the_memory_is_free() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    weights = [torch.from_numpy(values), torch.from_numpy(np.ones((4, 4), np.float32))[:, :3]]
    freed = weakref.ref(values)
    leaving = Offload(weights)
    del values
    leaving.finish()
    gc.collect()
    assert freed() is None
    assert torch.equal(weights[0], torch.arange(12.0).view(3, 4))


def test_nothing_is_copied_while_times_are_taken() -> None:
    weights = [torch.full((8,), 1.0)]
    begun = threading.Event()

    class Waiting(Offload):
        def _copy(self) -> None:
            begun.wait(60)
            super()._copy()

    leaving = Waiting(weights)
    with leaving.waiting(), leaving.waiting():
        begun.set()
        leaving._thread.join(0.1)
        assert leaving._thread.is_alive()
    assert leaving.nbytes == 32
    leaving.finish()
    assert torch.equal(weights[0], torch.full((8,), 1.0)) and leaving.nbytes == 0
    assert leaving.original(weights[0]) is None
