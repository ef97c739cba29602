"""Which inputs of a step's later calls were ready before an earlier call; no GPU is asked."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asyncdiff.generation import readiness
from asyncdiff.generation.readiness import Readiness
from asyncdiff.graph.signature import Role
from asyncdiff.runtime.step import Caller

GPU = torch.device("cuda", 0)


def tensor(address: int, version: int = 0, nbytes: int = 64) -> Any:
    return SimpleNamespace(
        untyped_storage=lambda: SimpleNamespace(nbytes=lambda: nbytes),
        device=GPU,
        dtype=torch.float32,
        shape=(2,),
        stride=lambda: (1,),
        data_ptr=lambda: address,
        is_inference=lambda: False,
        _version=version,
    )


def call(latents: Any, *conditioning: Any) -> Any:
    places = tuple(range(1, 1 + len(conditioning)))
    where = {Role.LATENTS: (0,), Role.CONDITIONING: places, Role.TIMESTEP: ()}
    return SimpleNamespace(tensors=[latents, *conditioning], indices=where.__getitem__)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Of a GPU: how many bytes were allocated."""
    found = SimpleNamespace(count=1)
    monkeypatch.setattr(readiness, "_allocated_on", lambda device: (device, found.count))
    monkeypatch.setattr(readiness, "Caller", lambda device: SimpleNamespace(stream="main"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "main")
    return found


def served(known: Readiness, memory: SimpleNamespace, one: Any, new: bool = True) -> Any:
    """A call, which allocates, too."""
    known.came(one, new)
    ready = known.of(one)
    memory.count += 3
    known.returned(one, new_next=True)
    return ready


def test_conditioning_that_was_there_is_known(memory: SimpleNamespace) -> None:
    known, latents = Readiness(), tensor(1)
    first = served(known, memory, call(latents, tensor(2)))
    assert first.moves is not None and first.everything is None
    for address in (3, 4):
        later = served(known, memory, call(latents, tensor(address)))
        assert later.moves is first.moves and later.everything is first.moves


def test_what_was_made_between_two_calls_is_not(memory: SimpleNamespace) -> None:
    known, latents = Readiness(), tensor(1)
    first = served(known, memory, call(latents, tensor(2)))
    memory.count += 128  # two texts, for the next two calls
    for address in (3, 4):
        later = served(known, memory, call(latents, tensor(address)))
        assert later.moves is first.moves and later.everything is None


def test_what_is_larger_than_all_that_was_made_between_two_calls_is_known(
    memory: SimpleNamespace,
) -> None:
    """A pipeline divides the timestep anew for each call, and gives all of them one guidance."""
    known, latents, guidance = Readiness(), tensor(1), tensor(7, nbytes=4)
    first = served(known, memory, call(latents, tensor(2), guidance))
    for address, text_bytes, there in ((3, 64, True), (4, 64, True), (5, 12, False)):
        memory.count += 4
        later = served(known, memory, call(latents, tensor(address, nbytes=text_bytes), guidance))
        assert later.moves is first.moves
        assert later.everything is (first.moves if there else None)
    memory.count = 0  # counted anew
    assert served(known, memory, call(latents, tensor(6), guidance)).everything is None


def test_what_was_written_to_is_not(memory: SimpleNamespace) -> None:
    known, latents = Readiness(), tensor(1)
    first = served(known, memory, call(latents, tensor(2)))
    assert served(known, memory, call(latents, tensor(3, version=1))).everything is None
    assert served(known, memory, call(latents, tensor(4))).everything is first.moves


def test_values_are_compared_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new one in each generation would have no memory yet."""
    made: list[Any] = []

    def stream(device: torch.device) -> Any:
        made.append(SimpleNamespace(device=device, wait_event=lambda event: None))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    caller = Caller.__new__(Caller)
    caller.stream = SimpleNamespace(device=GPU, wait_stream=lambda stream: None)  # type: ignore[assignment]
    caller.ready = None
    streams: dict[torch.device, Any] = {}
    for _ in range(2):
        with caller.beside(streams):
            pass
    assert list(streams.values()) == made and len(made) == 1


def test_other_latents_begin_anew(memory: SimpleNamespace) -> None:
    known = Readiness()
    first = served(known, memory, call(tensor(1), tensor(2)))
    other = served(known, memory, call(tensor(9), tensor(3)))
    assert other.moves is not first.moves and other.everything is None
