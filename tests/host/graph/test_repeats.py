"""Layers that are alike are traced once, and the graph is what it would be without that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from export_cache import uncached
from families import FAMILIES
from torch import fx, nn
from torch.utils import _pytree as pytree

from asyncdiff import AsyncDenoiser, parallelize
from asyncdiff.graph import export as exporting
from asyncdiff.graph.tracing import repeats
from asyncdiff.graph.tracing.bodies import UnfollowedError
from asyncdiff.graph.tracing.repeats import Repeats

OFTEN = ("SD 1.5", "FLUX")
#: The exporter meets tensors of its own in the second export of a Z-Image.
SELDOM = tuple(name for name in FAMILIES if name not in (*OFTEN, "Z-Image"))
#: Masks, for whose values they are exported; autocast, which makes a graph of its own of a part.
ALL_TRACED = ("Lumina 2", "Mochi")


def _described(program: Any) -> list[tuple[Any, ...]]:
    """All that there is in a program's graph, memory that values share included."""
    memory: dict[int, int] = {}

    def of(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        number = memory.setdefault(x.untyped_storage()._cdata, len(memory))
        size = x.untyped_storage().nbytes()
        return x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, number, size

    found = []
    for node in program.graph.nodes:
        args = repr(fx.map_arg((node.args, node.kwargs), lambda n: n.name))
        stack = list((node.meta.get("nn_module_stack") or {}).items())
        value = repr(pytree.tree_map(of, node.meta.get("val")))
        found.append((node.name, node.op, str(node.target), args, stack, value))
    results = [getattr(s.arg, "name", None) for s in program.graph_signature.output_specs]
    return [*found, tuple(results)]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every export is made both ways; grows by what was exported."""
    made: list[str] = []
    uncached(monkeypatch)
    once_each = exporting._once_each

    def both(module: nn.Module, kwargs: dict[str, Any]) -> Any:
        program = once_each(module, kwargs)
        plain = torch.export.export(module, (), kwargs, strict=False)
        for each in (program, plain):
            each.graph.eliminate_dead_code()
        assert _described(program) == _described(plain)
        made.append(type(module).__name__)
        return program

    monkeypatch.setattr(exporting, "_once_each", both)
    return made


@pytest.mark.parametrize(
    "name", [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM)]
)
def test_the_graph_is_the_same(name: str, compared: list[str]) -> None:
    pipe, call = FAMILIES[name]()
    with parallelize(pipe, devices=["cpu"] * 2, components=2, split="estimate", warmup=2):
        pipe(**{"output_type": "latent", **call, "num_inference_steps": 3})
    assert bool(compared) != (name in ALL_TRACED)


class Block(nn.Module):
    """Six layers that count, and a number among the attributes."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))
        self.scale = scale
        self.beside: Any = None

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            x = x + self.scale * layer(x).tanh() + time
        return x if self.beside is None else x + self.beside["x"], time


class Blocks(nn.Module):
    """A denoiser of blocks; ``each`` tells which one is called in the n-th place, ``before`` is
    called with the blocks and what comes in."""

    def __init__(
        self,
        blocks: list[nn.Module],
        order: list[int] | None = None,
        before: Callable[[list[Any], torch.Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.order = order or list(range(len(blocks)))
        self.before = before

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if self.before is not None:
            self.before(list(self.blocks), sample)
        for i in self.order:
            sample, timestep = self.blocks[i](sample, timestep)
        return sample


def _repeated(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many blocks are not traced in an export, of which the result is right."""
    module = module.eval().requires_grad_(False)
    uncached(monkeypatch)
    once_each, counts = exporting._once_each, [0]

    def counted(*args: Any) -> Any:
        program = once_each(*args)
        counts.append(repeats[-1])
        return program

    repeats = [0]
    stand_in = Repeats._repeated

    def repeated(*args: Any) -> Any:
        repeats[-1] += 1
        return stand_in(*args)

    monkeypatch.setattr(exporting, "_once_each", counted)
    monkeypatch.setattr(Repeats, "_repeated", repeated)
    sample, time = torch.randn(2, 8), torch.tensor(0.3)
    denoiser = AsyncDenoiser(module, components=2, split="estimate", devices=["cpu"] * 2)
    with contextlib.closing(denoiser), denoiser.generation([0.3, 0.3]):
        for _ in range(2):
            torch.testing.assert_close(denoiser(sample, time), module(sample, time))
    monkeypatch.undo()
    return counts[-1]


def test_one_of_each_kind_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _repeated(Blocks([Block(8) for _ in range(5)]), monkeypatch) == 4
    # What is no tensor of theirs is alike only if it is equal.
    blocks: list[nn.Module] = [Block(8, scale) for scale in (1.0, 0.5, 1.0, 0.5, 2.0)]
    assert _repeated(Blocks(blocks), monkeypatch) == 2


def test_what_is_returned_may_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FLUX's blocks return their tokens, of text and of the picture."""

    class Parted(Block):
        def forward(self, x: torch.Tensor, time: torch.Tensor) -> Any:
            both, time = super().forward(torch.cat([x, x]), time)
            first, other = both[:2], both[2:]
            return first + other, other.mean() if other.dim() > 2 else time

    class Halves(Block):
        def forward(self, x: torch.Tensor, time: torch.Tensor) -> Any:
            both, _ = super().forward(torch.cat([x, time.expand_as(x)]), time.mean())
            return both[:2], both[2:]

    assert _repeated(Blocks([Parted(8) for _ in range(4)]), monkeypatch) == 3
    # The first one is given a tensor of one element, the second one parts of one tensor.
    assert _repeated(Blocks([Halves(8) for _ in range(5)]), monkeypatch) == 3


def test_weights_that_layers_share_stay_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [Block(8) for _ in range(4)]
    for block in blocks[1:]:
        block.layers[2].weight = blocks[0].layers[2].weight
    blocks[3].layers[4] = blocks[2].layers[1]  # of the same shapes
    assert _repeated(Blocks([*blocks]), monkeypatch) == 3


def test_a_block_that_is_called_twice_has_all_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[nn.Module] = [Block(8) for _ in range(3)]
    assert _repeated(Blocks(blocks, order=[0, 1, 1, 2]), monkeypatch) == 0
    # But the one that was traced may be.
    assert _repeated(Blocks(blocks, order=[0, 1, 2, 0]), monkeypatch) == 2


def test_what_a_block_is_told_between_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(blocks: list[Any], sample: torch.Tensor) -> None:
        for i, block in enumerate(blocks):
            block.scale = float(1 + i // 3)

    blocks: list[nn.Module] = [Block(8) for _ in range(4)]
    assert _repeated(Blocks(blocks, before=scaled), monkeypatch) == 2


def test_what_blocks_are_declared_not_to_read_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As ComfyUI's blocks are told which one they are. Tensors count, and so do other dictionaries
    and other keys."""

    class Numbered(Block):
        def forward(self, x: torch.Tensor, time: torch.Tensor, **told: Any) -> Any:
            found = told["options"].get("shift", 0.0)
            return super().forward(x + found, time)

    class Told(Blocks):
        def __init__(self, key: str, value: Any, argument: str = "options") -> None:
            super().__init__([Numbered(8) for _ in range(4)])
            self.key, self.value, self.argument = key, value, argument

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            for i, block in enumerate(self.blocks):
                options = {"number": i} if self.argument == "options" else {}
                told = {self.argument: {self.key: self.value(i)}}
                told["options"] = told.get("options", {}) | options
                sample, timestep = block(sample, timestep, **told)
            return sample

    def declared(module: nn.Module, modules: str = __name__) -> int:
        monkeypatch.setattr(repeats, "_UNREAD", {})
        repeats.unread(modules, "options", ["number", "shift"])
        return _repeated(module, monkeypatch)

    numbered = Told("other", lambda i: None)
    assert _repeated(numbered, monkeypatch) == 0
    assert declared(numbered) == 3
    assert declared(numbered, "another.") == 0
    assert declared(Told("shift", lambda i: torch.tensor(float(i)))) == 0
    assert declared(Told("other", lambda i: i)) == 0
    assert declared(Told("number", lambda i: i, "others")) == 0


def test_what_comes_in_beside_the_arguments_has_all_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    uncached(monkeypatch)
    beside: dict[str, Any] = {"x": 0.0}
    blocks = [Block(8) for _ in range(3)]
    for block in blocks:
        block.beside = beside

    def told(blocks: list[Any], sample: torch.Tensor) -> None:
        beside["x"] = sample * 2

    with pytest.raises(UnfollowedError, match="which it was not given"):
        exporting._once_each(
            Blocks(blocks, before=told).eval().requires_grad_(False),
            {"sample": torch.randn(2, 8), "timestep": torch.tensor(0.3)},
        )


def test_layers_are_left_as_they_were(compared: list[str]) -> None:
    module = Blocks([Block(8) for _ in range(3)]).eval().requires_grad_(False)
    denoiser = AsyncDenoiser(module, components=2, split="estimate", devices=["cpu"] * 2)
    with contextlib.closing(denoiser), denoiser.generation([0.3]):
        denoiser(torch.randn(2, 8), torch.tensor(0.3))
    assert compared == ["Blocks"]
    assert not any("forward" in vars(layer) for layer in module.modules())


class Autocast(Block):
    """A block with a graph of its own inside."""

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, time = super().forward(x, time)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            return torch.sin(x) * torch.cos(x), time


def test_names_do_not_depend_on_what_was_exported_before() -> None:
    """They are part of what cuts are kept by, also those of graphs inside."""
    module = Blocks([Autocast(8) for _ in range(3)]).eval()
    given = {"sample": torch.randn(2, 8), "timestep": torch.tensor(0.3)}
    names = [
        [node.name for node in exporting._once_each(module, given).graph.nodes] for _ in range(2)
    ]
    assert names[0] == names[1] and any("submod" in name for name in names[0])
