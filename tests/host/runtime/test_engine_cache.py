"""How many engines there are at once, and what becomes of them where memory is short."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser
from asyncdiff.graph.weights import Weights
from asyncdiff.runtime import making
from asyncdiff.runtime.cutting import cutter, profiler
from asyncdiff.runtime.engine import Engine
from asyncdiff.runtime.worker import Worker

SPLIT = [["enter", "down"], ["mix", "up", "leave"]]


class Memory:
    """So many engines fit at once; of those that there are."""

    def __init__(self) -> None:
        self.engines: set[int] = set()
        self.room = self.most = 100
        self.tries = 0


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    state = Memory()
    state.most = 0

    class Counted(Engine):
        def __init__(self, *args: Any, **options: Any) -> None:
            state.tries += 1
            if len(state.engines) >= state.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB")
            state.engines.add(id(self))
            state.most = max(state.most, len(state.engines))
            super().__init__(*args, **options)

        def close(self) -> None:
            state.engines.discard(id(self))
            super().close()

    monkeypatch.setattr(making, "Engine", Counted)
    return state


@pytest.fixture
def denoiser() -> Iterator[AsyncDenoiser]:
    made = AsyncDenoiser(toy(), devices=["cpu"] * 2, split=SPLIT)
    yield made
    made.close()


def test_one_has_to_go_before_another_is_made(memory: Memory, denoiser: AsyncDenoiser) -> None:
    for batch in (1, 2, 3, 4, 5, 1):
        denoiser.prepare(**toy_call(batch=batch))
    assert (memory.most, memory.tries) == (4, 6)


def test_kinds_that_come_in_turns_are_told_of_once(
    memory: Memory, denoiser: AsyncDenoiser, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "asyncdiff"):
        for batch in (1, 2, 3, 4, 5):
            denoiser.prepare(**toy_call(batch=batch))
        assert not caplog.records
        for batch in (1, 2, 3):
            denoiser.prepare(**toy_call(batch=batch))
    (said,) = caplog.records
    assert "(sample was (5, 4, 8, 8) torch.float64, is (1, 4, 8, 8)" in said.getMessage()


def test_kinds_that_come_again_are_not_exported_again(
    denoiser: AsyncDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But with the weights that there are then."""
    exported = []
    capture = cutter.capture

    def counted(*args: Any) -> Any:
        exported.append(args)
        return capture(*args)

    monkeypatch.setattr(cutter, "capture", counted)
    module = denoiser.module
    for batch in (1, 2, 3, 4, 5):
        denoiser.prepare(**toy_call(batch=batch))
    assert len(exported) == 5
    before = weakref.ref(module.leave.weight)
    module.leave.weight = torch.nn.Parameter(module.leave.weight * 2.0, requires_grad=False)
    for batch in (1, 2, 3, 4):
        call = toy_call(batch=batch)
        with denoiser.generation([900]):
            (got,) = denoiser(**call)
        torch.testing.assert_close(got, module(**call)[0])
    assert len(exported) == 5
    gc.collect()
    assert before() is None  # nothing holds what was replaced


def test_calls_of_other_conditioning_are_cut_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured for a prompt of another length, and ranks hold weights once."""
    measured = []
    measure = profiler.measure

    def counted(captured: Any, *args: Any) -> Any:
        measured.append(captured)
        return measure(captured, *args)

    monkeypatch.setattr(profiler, "measure", counted)
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2)
    call = toy_call()
    denoiser.prepare(**call)
    cuts = denoiser.partition.cuts
    for length in (7, 9, 11):
        text = torch.randn(2, length, 6, dtype=torch.float64)
        denoiser.prepare(**call | {"encoder_hidden_states": text})
        assert denoiser.partition.cuts == cuts and len(measured) == 1
    denoiser.prepare(**toy_call(size=16))
    assert len(measured) == 2
    denoiser.close()


def test_others_are_dropped_where_memory_is_short(
    memory: Memory, denoiser: AsyncDenoiser, caplog: pytest.LogCaptureFixture
) -> None:
    memory.room = 2
    with caplog.at_level(logging.WARNING, "asyncdiff"):
        for batch in (1, 2, 3):
            denoiser.prepare(**toy_call(batch=batch))
    assert len(memory.engines) == 1 and memory.tries == 4
    (said,) = caplog.records
    assert "no memory for one more kind" in said.getMessage()
    memory.room = 1
    denoiser.prepare(**toy_call(batch=1))
    assert len(memory.engines) == 1 and memory.tries == 6
    memory.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        denoiser.prepare(**toy_call(batch=2))
    assert memory.tries == 8 and not memory.engines
    with pytest.raises(torch.OutOfMemoryError):  # there is nothing to drop
        denoiser.prepare(**toy_call(batch=2))
    assert memory.tries == 9


def test_other_failures_drop_nothing(
    memory: Memory, denoiser: AsyncDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser.prepare(**toy_call(batch=1))

    def fails(*args: Any, **options: Any) -> None:
        raise ValueError("out of luck")

    monkeypatch.setattr(making, "Engine", fails)
    with pytest.raises(ValueError, match="out of luck"):
        denoiser.prepare(**toy_call(batch=2))
    assert len(memory.engines) == 1


def test_graphs_have_room_made_for_them_too(
    memory: Memory, denoiser: AsyncDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in (1, 2, 3):
        denoiser.prepare(**toy_call(batch=batch))
    tries = []

    def prepare(engine: Engine, plan: Any) -> None:
        tries.append(len(memory.engines))
        if len(memory.engines) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Engine, "prepare", prepare)
    denoiser.prepare(**toy_call(batch=2), steps=4)
    assert tries == [3, 1]
    assert next(iter(denoiser._engines._kept))[0].inputs[0].shape[0] == 2


def _rows(denoiser: AsyncDenoiser, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What ranks make of a call, and what the module does."""
    call = toy_call(batch=batch)
    with denoiser.generation([900]):
        (got,) = denoiser(**call)
    return got, denoiser.module(**call)[0]


def test_copies_of_weights_are_made_once_for_all_sizes(
    denoiser: AsyncDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a weight was written to in between, in whichever way."""
    made = []
    bring, take = Weights.bring, Weights._take

    def brought(weights: Weights, captured: Any, name: str, device: torch.device) -> torch.Tensor:
        made.append(name)
        return bring(weights, captured, name, device)

    def taken(weights: Weights, held: Any, weight: torch.Tensor) -> None:
        made.append("again")
        take(weights, held, weight)

    monkeypatch.setattr(Weights, "_shared", staticmethod(lambda weight, device: False))
    monkeypatch.setattr(Weights, "bring", brought)
    monkeypatch.setattr(Weights, "_take", taken)
    torch.testing.assert_close(*_rows(denoiser, 1))
    once = len(made)
    for batch in (2, 3):
        torch.testing.assert_close(*_rows(denoiser, batch))
        assert len(made) == once > 0
    first, second = denoiser.module.leave.weight, denoiser.module.mix.weight
    for batch, write in ((4, lambda: first.mul_(2.0)), (5, lambda: second.data.mul_(2.0))):
        made.clear()
        write()
        torch.testing.assert_close(*_rows(denoiser, batch))
        assert "again" in made
    torch.testing.assert_close(*_rows(denoiser, 3))  # which were made before that
    made.clear()
    torch.testing.assert_close(*_rows(denoiser, 1))  # whose engine had to make room
    assert not made


def test_nothing_is_collected_while_ranks_are_made(
    denoiser: AsyncDenoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would look through all objects there are again and again."""
    seen = []
    monkeypatch.setattr(
        making, "Engine", lambda *a, **k: seen.append(gc.isenabled()) or Engine(*a, **k)
    )
    denoiser.prepare(**toy_call())
    assert seen == [False] and gc.isenabled()


def _swapped(weight: torch.Tensor) -> Callable[[], None]:
    before, weight.data = weight.data, 2 * weight.data

    def put_back() -> None:
        weight.data = before

    return put_back


def _doubled(weight: torch.Tensor) -> Callable[[], None]:
    weight.data.mul_(2.0)  # unseen by torch
    return lambda: weight.data.mul_(0.5)


@pytest.mark.parametrize("write", [_swapped, _doubled])
@pytest.mark.parametrize("batches", [(1, 2, 1), (1, 2, 3), (2, 2, 1), (2, 1, 2)], ids=str)
def test_weights_that_are_put_back(
    denoiser: AsyncDenoiser,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[torch.Tensor], Callable[[], None]],
    batches: tuple[int, int, int],
) -> None:
    """As averages do: what calls of another size took meanwhile are the copies of all."""
    monkeypatch.setattr(Weights, "_shared", staticmethod(lambda weight, device: False))
    before, meanwhile, after = batches
    for batch in {1, before}:
        torch.testing.assert_close(*_rows(denoiser, batch))
    put_back = write(denoiser.module.mix.weight)
    torch.testing.assert_close(*_rows(denoiser, meanwhile))
    put_back()
    torch.testing.assert_close(*_rows(denoiser, after))


def test_ranks_of_exact_steps_that_are_made_after_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has copies for calls of another size, of more than its component."""
    monkeypatch.setattr(Weights, "_shared", staticmethod(lambda weight, device: False))
    bring = Weights.get

    def apart(weights: Weights, captured: Any, name: str, device: torch.device) -> Any:
        return bring(weights, captured, name, at[-1])

    def placed(worker: Worker, parts: Any, rank: int, *args: Any, **options: Any) -> None:
        at.append(torch.device("cpu", rank + (len(parts.components) == 1)))
        make(worker, parts, rank, *args, **options)

    make, at = Worker.__init__, list[torch.device]()
    monkeypatch.setattr(Weights, "get", apart)
    monkeypatch.setattr(Worker, "__init__", placed)
    settings: dict[str, Any] = {"split": SPLIT, "exact_mode": "split", "warmup": 1}
    with contextlib.closing(AsyncDenoiser(toy(), devices=["cpu"] * 2, **settings)) as denoiser:

        def check(call: dict[str, torch.Tensor]) -> None:
            with denoiser.generation([900], branches=2):
                for _ in range(2):
                    torch.testing.assert_close(denoiser(**call), denoiser.module(**call))

        check(toy_call(batch=1))
        denoiser.prepare(**toy_call(batch=2))
        denoiser.module.enter.weight.mul_(2.0)
        check(toy_call(batch=2))


@pytest.mark.parametrize("write", [lambda x: x.mul_(2.0), lambda x: x.data.mul_(2.0)])
def test_weights_that_took_the_place_of_others_and_are_written_to(
    denoiser: AsyncDenoiser, monkeypatch: pytest.MonkeyPatch, write: Callable[[torch.Tensor], Any]
) -> None:
    """While calls of another size came, which have the same copies."""
    monkeypatch.setattr(Weights, "_shared", staticmethod(lambda weight, device: False))
    torch.testing.assert_close(*_rows(denoiser, 1))
    denoiser.module.mix.weight = nn.Parameter(-denoiser.module.mix.weight, requires_grad=False)
    torch.testing.assert_close(*_rows(denoiser, 2))
    write(denoiser.module.mix.weight)
    torch.testing.assert_close(*_rows(denoiser, 1))
