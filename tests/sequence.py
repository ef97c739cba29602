"""Denoisers of families in their first call, and sequence-parallel graphs run in the threads of one
process, as ranks would."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import fx, nn

from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.signature import Call, parse
from asyncdiff.sequence.program import program
from asyncdiff.sequence.sharding import Sharding
from asyncdiff.sequence.shares import Shares


class _Stop(Exception):
    pass


@cache
def of_family(name: str) -> tuple[Captured, Call, list[torch.Tensor]]:
    """A family's denoiser in its first call, and what it returns."""
    pipe, args = FAMILIES[name]()
    module, given = pipe.transformer, {}

    def look(*args: Any, **kwargs: Any) -> Any:
        given["call"] = args, kwargs
        raise _Stop

    module.forward, plain = look, module.forward
    with pytest.raises(_Stop):
        pipe(**args)
    del module.forward
    positional, named = given["call"]
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(plain(*positional, **named))
    call = parse(module, positional, named)
    return capture(module, call), call, [x for x in expected if isinstance(x, torch.Tensor)]


def values(captured: Captured, call: Call) -> list[Any]:
    """Of the placeholders; arguments that are no tensors are in the graph."""
    of_inputs = {name: call.tensors[index] for name, index in captured.inputs.items()}
    places = captured.graph.find_nodes(op="placeholder")
    return [captured.weights.get(n.name, of_inputs.get(n.name)) for n in places]


class Streams(nn.Module):
    """Text and picture with weights of their own, as in SD3, and what a text may do besides: attend
    to itself, ask all tokens by itself, be needed whole, by itself or beside the picture, be in
    another precision."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.picture, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        attend, each = nn.functional.scaled_dot_product_attention, [encoder_hidden_states, sample]
        text = self.text[0](encoder_hidden_states) * (1 + timestep / 1000)
        query, key, value = self.picture(sample).chunk(3, -1)
        keys, values = torch.cat([text, key], 1), torch.cat([text, value], 1)
        mixed = attend(torch.cat([text, query], 1), keys, values)
        text, picture = mixed.split([x.shape[1] for x in each], 1)
        text = text + attend(self.text[1](text), self.text[2](text), text)
        both = torch.cat([text, picture], 1)
        text = text + attend(self.text[3](text), both, both * 0.5)
        picture = picture.type_as(text) * torch.cdist(text, picture).mean()
        picture = picture + text.cumsum(1)[:, -1:]
        wide = torch.cat([text[:, :0], text.double(), picture.float()], 1)
        wide = wide[:, text.shape[1] :]
        return (wide + self.out(wide.to(picture.dtype)),)


def streams() -> Streams:
    """One with fixed weights, in eval mode."""
    torch.manual_seed(0)
    return Streams().eval().requires_grad_(False)


def streams_call(text: int, picture: int) -> dict[str, torch.Tensor]:
    """Keyword arguments of one call, with so many tokens."""
    draw = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(1, picture, 8, generator=draw),
        "timestep": torch.tensor(900),
        "encoder_hidden_states": torch.randn(1, text, 8, generator=draw),
    }


class Gatherer:
    """All-gathers between so many threads, in the order in which each of them asks."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.parts: list[Any] = [None] * ranks
        self.count = 0

    def of(self, rank: int) -> Any:
        def gather(local: torch.Tensor, dim: int) -> torch.Tensor:
            self.parts[rank] = local
            self.barrier.wait()
            out = torch.cat(self.parts, dim)
            self.count += rank == 0
            self.barrier.wait()
            return out

        return gather


def run(
    captured: Captured, sharding: Sharding, shares: Shares, values: Sequence[torch.Tensor]
) -> tuple[list[list[Any]], Gatherer]:
    """The outputs of every rank, whose inputs are the values of the placeholders."""
    ranks = shares.ranks
    gatherer = Gatherer(ranks)
    out: list[Any] = [None] * ranks
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            graph = program(captured, sharding, rank, shares, gatherer.of(rank))
            with torch.no_grad():
                out[rank] = list(fx.Interpreter(captured.root, graph=graph).run(*values))
        except BaseException as e:
            errors.append(e)
            gatherer.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return out, gatherer
