"""Which inputs of a step's later calls were ready before an earlier call; no GPU is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asyncdiff.generation import readiness
from asyncdiff.generation.readiness import Readiness
from asyncdiff.graph.signature import Role

GPU = torch.device("cuda", 0)


def tensor(address: int, version: int = 0) -> Any:
    return SimpleNamespace(
        device=GPU,
        dtype=torch.float32,
        shape=(2,),
        stride=lambda: (1,),
        data_ptr=lambda: address,
        is_inference=lambda: False,
        _version=version,
    )


def call(latents: Any, text: Any) -> Any:
    where = {Role.LATENTS: (0,), Role.CONDITIONING: (1,), Role.TIMESTEP: ()}
    return SimpleNamespace(tensors=[latents, text], indices=where.__getitem__)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Of a GPU: how often it was allocated."""
    found = SimpleNamespace(count=1)
    monkeypatch.setattr(readiness, "_allocations", lambda device: (device, found.count))
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
    memory.count += 2  # two texts, for the next two calls
    for address in (3, 4):
        later = served(known, memory, call(latents, tensor(address)))
        assert later.moves is first.moves and later.everything is None


def test_what_was_written_to_is_not(memory: SimpleNamespace) -> None:
    known, latents = Readiness(), tensor(1)
    first = served(known, memory, call(latents, tensor(2)))
    assert served(known, memory, call(latents, tensor(3, version=1))).everything is None
    assert served(known, memory, call(latents, tensor(4))).everything is first.moves


def test_other_latents_begin_anew(memory: SimpleNamespace) -> None:
    known = Readiness()
    first = served(known, memory, call(tensor(1), tensor(2)))
    other = served(known, memory, call(tensor(9), tensor(3)))
    assert other.moves is not first.moves and other.everything is None
