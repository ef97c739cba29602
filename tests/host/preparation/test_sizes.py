"""One export serves calls of several sizes: what comes of it is what an export for each is, and
where that cannot be, each is exported."""

from __future__ import annotations

import builtins
import contextlib
import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from asyncdiff import AsyncDenoiser
from asyncdiff.graph.capture import capture
from asyncdiff.graph.signature import parse
from asyncdiff.graph.state.structure import Structure
from asyncdiff.graph.tracing.resizing import Resizable, Twin, UnfitError, equal
from asyncdiff.graph.tracing.symbols import open_sizes, structure_of, symbols_kept
from asyncdiff.preparation.graph_text import NotKeptError, to_data
from asyncdiff.runtime.cutting import cutter

Question = Callable[[Any, torch.Tensor], torch.Tensor]


class Reading(nn.Module):
    """Reads a text of any length, by ``how``."""

    def __init__(self, how: Question) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.randn(64, 4))

    def forward(self, sample: torch.Tensor, timestep: Any, text: torch.Tensor) -> Any:
        h = self.first(sample) * timestep
        text = self.how(self, text)
        return (self.second(torch.softmax(h @ text.mT, -1) @ text + h),)


def places(module: Any, text: torch.Tensor) -> torch.Tensor:
    """As Qwen-Image does it."""
    return text + module.table[3 : 3 + int(text.shape[1])]


def padded(module: Any, text: torch.Tensor) -> torch.Tensor:
    """As Z-Image does it: to a multiple, if need be, a sample by itself."""
    rows = []
    for row in text:
        more = (-len(row)) % 8
        rows.append(torch.cat([row, row[-1:].repeat(more, 1)]) if more > 0 else row)
    return torch.stack(rows) + module.table[torch.arange(len(rows[0]))]


def counted(module: Any, text: torch.Tensor) -> torch.Tensor:
    """Has a symbol in a tensor, of which something is made."""
    return text / torch.tensor(text.shape[1])


def one_by_one(module: Any, text: torch.Tensor) -> torch.Tensor:
    """Has as many operations as there are tokens."""
    return torch.stack([text[:, i] + module.table[i] for i in range(text.shape[1])], 1)


def given(length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {
        "sample": torch.randn(2, 3, 4, generator=generator),
        "timestep": torch.tensor(0.5),
        "text": torch.randn(2, length, 4, generator=generator),
    }


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is exported from now on: the sizes that are symbols, or None."""
    made: list[Any] = []

    def noted(module: Any, call: Any, sizes: Any = None) -> Any:
        made.append(sizes)
        return capture(module, call, sizes)

    monkeypatch.setattr(cutter, "capture", noted)
    return made


@contextlib.contextmanager
def spread(module: nn.Module) -> Iterator[AsyncDenoiser]:
    denoiser = AsyncDenoiser(module.eval(), components=2, warmup=2, split="estimate")
    with torch.no_grad(), contextlib.closing(denoiser):
        yield denoiser


def check(denoiser: AsyncDenoiser, call: dict[str, torch.Tensor]) -> None:
    """It computes the same bits as the denoiser itself."""
    with denoiser.generation([0.5, 0.25]):
        assert torch.equal(denoiser(**call)[0], denoiser.module(**call)[0])


_OPEN = {"text": (1,)}


@pytest.mark.parametrize(
    ("how", "lengths", "expected"),
    [
        (places, (5, 6, 9, 12, 2), [None, _OPEN]),
        # 16 and 24 need no padding; 1 is a size of which the exporter makes a number.
        (padded, (5, 6, 11, 13, 16, 24, 1), [None, _OPEN, None, None, None]),
        # What is exported first is on another side of the condition than what follows.
        (padded, (8, 5, 6, 14), [None, _OPEN, None]),
        (counted, (5, 6, 9), [None, _OPEN, None, None]),
        (one_by_one, (5, 6, 9), [None, _OPEN, None, None]),
    ],
    ids=["places", "padded", "other side", "counted", "one by one"],
)
def test_one_export_for_many_lengths(
    how: Question, lengths: tuple[int, ...], expected: list[Any], exports: list[Any]
) -> None:
    torch.manual_seed(0)
    with spread(Reading(how)) as denoiser:
        for length in lengths:
            check(denoiser, given(length))
            denoiser._engines._drop(list(denoiser._engines._kept))
    assert exports == expected


def test_other_sizes_of_latents_are_exported(exports: list[Any]) -> None:
    with spread(Reading(places)) as denoiser:
        check(denoiser, given(5))
        check(denoiser, given(5) | {"sample": torch.randn(2, 7, 4)})
        check(denoiser, given(6) | {"sample": torch.randn(2, 7, 4)})
    assert exports == [None, None, _OPEN]


def test_cuts_and_weights_are_shared(exports: list[Any]) -> None:
    with spread(Reading(places)) as denoiser:
        cuts = []
        for length in (5, 6, 7):
            check(denoiser, given(length))
            cuts.append(denoiser.partition.cuts)
            weights = denoiser.partition.captured.weights
            assert any(w is denoiser.module.first.weight for w in weights.values())
    assert cuts[0] and cuts == cuts[:1] * 3


def test_weights_are_those_that_there_are(exports: list[Any]) -> None:
    with spread(Reading(places)) as denoiser:
        module = denoiser.module
        for length in (5, 6):
            check(denoiser, given(length))
        before = weakref.ref(module.first.weight)
        module.first.weight = nn.Parameter(module.first.weight * 2, requires_grad=False)
        for length in (5, 6, 7):  # the first two are given the new weight
            check(denoiser, given(length))
        assert len(exports) == 2
        denoiser._engines._drop(list(denoiser._engines._kept))
        gc.collect()
        assert before() is None
        module.how = padded  # another denoiser
        for length in (5, 6, 9):
            check(denoiser, given(length))
    assert exports[2:] == [None, _OPEN]


def compared(module: nn.Module, calls: list[dict[str, Any]]) -> list[bool]:
    """Whether the graph that an export with symbols gives for each call is what an export for it
    is."""
    parsed = [parse(module.eval(), (), call) for call in calls]
    signatures = [call.signature for call in parsed]
    assert len({structure_of(signature) for signature in signatures}) == 1
    twin = Twin.of(capture(module, parsed[0]))
    resizable = Resizable(capture(module, parsed[1], open_sizes(signatures[0], signatures[1])))
    found = []
    for call in parsed:
        made = resizable.at(call.signature, Structure(module), twin)
        exported = capture(module, call)
        found.append(equal(made, Twin.of(exported)))
        with contextlib.suppress(NotKeptError):  # graphs within the graph
            assert to_data(made) == to_data(exported)
    return found


@pytest.mark.parametrize("how", [places, padded])
def test_the_graph_is_that_of_an_export(how: Question) -> None:
    assert compared(Reading(how), [given(length) for length in (5, 12, 11)]) == [True] * 3


@pytest.mark.slow
def test_qwen_image() -> None:
    torch.manual_seed(0)
    module = diffusers.QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
    )

    def call(length: int) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 16, 4),
            "encoder_hidden_states": torch.randn(1, length, 8),
            "encoder_hidden_states_mask": torch.ones(1, length, dtype=torch.bool),
            "timestep": torch.ones(1),
            "img_shapes": [[(1, 4, 4)]],
            "return_dict": False,
        }

    assert all(compared(module, [call(n) for n in (5, 9, 7)]))


@pytest.mark.slow
def test_z_image() -> None:
    """Rotary embeddings of it are graphs within its graph."""
    torch.manual_seed(0)
    module = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=1,
        n_kv_heads=1,
        cap_feat_dim=8,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 32, 32],
    )

    def call(length: int) -> dict[str, Any]:
        x, text = torch.randn(4, 1, 8, 8), torch.randn(length, 8)
        return {"x": [x], "t": torch.ones(1), "cap_feats": [text], "return_dict": False}

    module(**call(5))  # which keeps tables
    assert all(compared(module, [call(n) for n in (5, 9, 40)]))
    with spread(module) as denoiser:
        for length in (5, 9, 40):
            with denoiser.generation([0.5, 0.25]):
                (got,) = denoiser(**(c := call(length)))
            assert torch.equal(got[0], module(**c)[0][0])


def test_what_is_no_twin_is_not_equal() -> None:
    module = Reading(places).eval()
    calls = [parse(module, (), given(n)) for n in (5, 6)]
    first, second = (capture(module, call) for call in calls)
    assert equal(first, Twin.of(capture(module, calls[0])))
    assert not equal(first, Twin.of(second))
    other = Reading(padded).eval()
    resizable = Resizable(
        capture(other, calls[0], open_sizes(calls[0].signature, calls[1].signature))
    )
    with pytest.raises(UnfitError):  # other operations
        resizable.at(calls[1].signature, Structure(other), Twin.of(first))


def test_python_has_its_own_back() -> None:
    module, space = Reading(padded), vars(sys.modules[__name__])
    with symbols_kept(module):
        assert space["len"] is not builtins.len and space["int"](3.5) == 3
        assert isinstance(3, space["int"]) and not isinstance("3", space["int"])
        assert space["int"]("11", base=2) == 3 and space["len"]([1, 2]) == 2
        assert space["len"](torch.ones(4, 2)) == 4
    assert "len" not in space and "int" not in space
