"""Layers that look alike and are not, or of which a call is seen by another one: a graph in which
one stands for the other would be wrong."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asyncdiff.graph import export as exporting
from asyncdiff.graph.side_effects import attributes_kept
from asyncdiff.graph.tracing.bodies import UnfollowedError
from asyncdiff.graph.tracing.repeats import Repeats


class Block(nn.Module):
    """Six layers that count; ``after`` is called with itself and what they make."""

    def __init__(self, after: Callable[..., Tensor] | None = None, **attributes: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.after = after
        for name, x in attributes.items():
            setattr(self, name, x)

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x if self.after is None else self.after(self, x, *given)


class Blocks(nn.Module):
    """A denoiser; ``told`` is called before each block, with its number, the block and its input,
    and says what else the block is given."""

    def __init__(
        self, blocks: list[Block], told: Callable[[int, Any, Tensor], Any] | None = None
    ) -> None:
        super().__init__()
        self.blocks, self.told = nn.ModuleList(blocks), told

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, *((self.told and self.told(i, block, x)) or ()))
        return x


def _right(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many blocks are not traced, in an export of which the result is right."""
    module, x = module.eval().requires_grad_(False), torch.randn(2, 8)
    repeated = Repeats._repeated
    found: list[str] = []

    def counted(self: Repeats, body: Any, path: str, leaves: Any) -> Any:
        found.append(path)
        return repeated(self, body, path, leaves)

    monkeypatch.setattr(Repeats, "_repeated", counted)
    with torch.no_grad(), contextlib.suppress(UnfollowedError):
        program = exporting._once_each(module, {"x": x})
        torch.testing.assert_close(program.module()(x=x), module(x))
        return len(found)
    return 0


class Slots:
    """An object of which the attributes do not tell all."""

    __slots__ = ("__dict__", "by")

    def __init__(self, by: float) -> None:
        self.by = by


class Table(dict[str, Any]):
    """A dictionary with attributes."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by


class Scaling:
    """An object with a method."""

    def __init__(self, by: float) -> None:
        self.by = by

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.by


def _applied(block: Any, x: Tensor) -> Tensor:
    out: Tensor = block.act(x)
    return out


def _scaled(block: Any, x: Tensor) -> Tensor:
    out: Tensor = x * block.scale.by
    return out


def _functions() -> list[Block]:
    return [Block(_applied, act=act) for act in (F.silu, F.relu, F.softsign)]


def _partials() -> list[Block]:
    return [Block(_applied, act=partial(torch.mul, other=i)) for i in (1, 2, 3)]


def _methods() -> list[Block]:
    return [Block(_applied, act=Scaling(float(i)).scaled) for i in (1, 2, 3)]


def _objects(made: Any) -> list[Block]:
    return [Block(_scaled, scale=made(float(i))) for i in (1, 2, 3)]


def _jitted() -> list[Block]:
    each = (torch.jit.trace(lambda x, i=i: x * i, torch.ones(2)) for i in (1, 2, 3))
    return [Block(_applied, act=act) for act in each]


def _tied() -> list[Block]:
    blocks = [Block() for _ in range(3)]
    blocks[0].layers[1].weight = blocks[0].layers[0].weight
    return blocks


def _place(block: Any, x: Tensor) -> Tensor:
    return x * float(1 + block.all[0].index(block))


def _places() -> list[Block]:
    blocks = [Block(_place) for _ in range(3)]
    for block in blocks:
        block.all = (blocks,)
    return blocks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "made",
    [
        *(_functions, _partials, _methods, _jitted, _tied, _places),
        *(partial(_objects, kind) for kind in (Slots, Table)),
    ],
)
def test_what_layers_have_tells_them_apart(
    made: Callable[[], list[Block]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _right(Blocks(made()), monkeypatch) <= 1  # of the two others, which may be alike


def test_layers_under_several_names_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [Block() for _ in range(3)]
    module = Blocks([blocks[0], blocks[1], blocks[0], blocks[2]])
    assert _right(module, monkeypatch) == 1
    assert not any("forward" in vars(layer) for layer in module.modules())


by, context, local = 1.0, ContextVar("context", default=1.0), threading.local()


class Space:
    """A class that keeps something for all."""

    by = 1.0


def _global(i: int) -> None:
    global by
    by = float(i)


def _helped(x: Tensor) -> Tensor:
    return x * Space.by


class OfGlobal(Block):
    def forward(self, x: Tensor, *given: Any) -> Tensor:
        return super().forward(x) * by


class OfHelper(Block):
    def forward(self, x: Tensor, *given: Any) -> Tensor:
        return _helped(super().forward(x))


class OfContext(Block):
    def forward(self, x: Tensor, *given: Any) -> Tensor:
        return super().forward(x) * context.get()


class OfThread(Block):
    def forward(self, x: Tensor, *given: Any) -> Tensor:
        return super().forward(x) * local.by


class OfClass(Block):
    by = 1.0

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        return super().forward(x) * self.by


class OfDefault(Block):
    def forward(self, x: Tensor, *given: Any, calls: list[int] = [0]) -> Tensor:  # noqa: B006
        calls[0] = calls[0] % 3 + 1
        return super().forward(x) * calls[0]


@pytest.mark.parametrize(
    ("block", "told"),
    [
        (OfGlobal, _global),
        (OfHelper, lambda i: setattr(Space, "by", float(i))),
        (OfContext, lambda i: context.set(float(i))),
        (OfThread, lambda i: setattr(local, "by", float(i))),
        (OfClass, lambda i: setattr(OfClass, "by", float(i))),
        (OfDefault, lambda i: None),
    ],
)
def test_what_code_reads_tells_calls_apart(
    block: type[Block], told: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(i: int, block: Any, x: Tensor) -> None:
        told(i)

    assert _right(Blocks([block() for _ in range(3)], before), monkeypatch) == 0


def test_a_tensor_that_is_gone_is_not_the_one_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def told(i: int, block: Any, x: Tensor) -> None:
        module.blocks[i - 1].scale = None
        block.scale = torch.tensor(float(i))

    def scaled(block: Any, x: Tensor) -> Tensor:
        out: Tensor = x * block.scale
        return out

    module = Blocks([Block(scaled, scale=None) for _ in range(4)], told)
    assert _right(module, monkeypatch) == 0


def test_a_weight_that_is_given_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(block: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    def told(i: int, block: Any, x: Tensor) -> Any:
        return (module.blocks[0].layers[0].weight,)

    module = Blocks([Block(times) for _ in range(3)], told)
    assert _right(module, monkeypatch) == 1


def test_what_all_know_is_not_what_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    known = types.SimpleNamespace(x=None)

    def told(i: int, block: Any, x: Tensor) -> None:
        known.x = x if i == 0 else known.x

    def added(block: Any, x: Tensor) -> Tensor:
        out: Tensor = x + block.known.x
        return out

    assert _right(Blocks([Block(added, known=known) for _ in range(3)], told), monkeypatch) == 0


class Keeping(Block):
    """A block that keeps how many rows there were."""

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        self.rows = x.shape[0]
        return super().forward(x)


class Putting(Block):
    """A block that puts something else into what it is given."""

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        into = given[0]
        into["x"] = into["x"] + x
        return super().forward(x) + x


def test_what_a_call_leaves_behind_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(i: int, block: Any, x: Tensor) -> None:
        assert i == 0 or module.blocks[i - 1].rows == 2

    module = Blocks([Keeping() for _ in range(4)], rows)
    assert _right(module, monkeypatch) == 0
    monkeypatch.undo()
    every: dict[str, Tensor] = {}

    def told(i: int, block: Any, x: Tensor) -> Any:
        every["x"] = x if i == 0 else every["x"]
        if i == 3:
            x.add_(every["x"])
        return (every,)

    assert _right(Blocks([Putting() for _ in range(4)], told), monkeypatch) == 0


class Trying(Blocks):
    """A denoiser that goes on after errors, and calls a block twice."""

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[1]):
            try:
                x = block(x)
            except Exception:
                x = x * 100
        return x


def test_a_denoiser_that_catches_errors_has_all_traced() -> None:
    module = Trying([Block() for _ in range(3)]).eval().requires_grad_(False)
    with torch.no_grad(), pytest.raises(UnfollowedError):
        exporting._once_each(module, {"x": torch.randn(2, 8)})


def test_layers_go_on_sharing_what_they_share() -> None:
    shared: dict[str, Any] = {"by": 1.0}
    module = Blocks([Block(shared=shared) for _ in range(3)]).eval().requires_grad_(False)
    exporting._once_each(module, {"x": torch.randn(2, 8)})
    assert all(block.shared is shared for block in module.blocks)
    first, second, _ = module.blocks
    with attributes_kept(module):
        first.shared = {}
        del second.shared
    assert all(block.shared is shared for block in module.blocks)
