"""Which denoisers are the same for an export, as far as other processes can tell."""

from __future__ import annotations

import types
from functools import partial
from typing import Any

import pytest
import torch
import toys
from diffusers.models import attention_processor
from tiny_pipelines import tiny_unet
from torch import nn
from toys import Toy, toy, toy_call

from asyncdiff.graph.signature import parse
from asyncdiff.preparation import key
from asyncdiff.preparation.identity import UnknownError, of_denoiser
from asyncdiff.preparation.key import of_cuts, of_graph

#: What a forward of a test names.
_SCALE = 1.0


def test_values_of_weights_do_not_count() -> None:
    assert of_denoiser(toy(0)) == of_denoiser(toy(5))
    assert of_denoiser(toy()) != of_denoiser(toy().float())
    assert of_denoiser(toy()) != of_denoiser(Toy(width=12).double().eval())
    shared = toy()
    shared.up[1].bias = shared.up[0].bias
    assert of_denoiser(toy()) != of_denoiser(shared)


def test_options_count() -> None:
    unet = tiny_unet()
    words = [of_denoiser(unet)]
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    words.append(of_denoiser(unet))
    unet.disable_freeu()
    unet.set_attn_processor(attention_processor.AttnProcessor())
    words.append(of_denoiser(unet))
    unet.set_attn_processor(attention_processor.AttnProcessor2_0())
    words.append(of_denoiser(unet.to(memory_format=torch.channels_last)))
    assert len(set(words)) == 4


def _forward(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    plain = Toy.forward
    monkeypatch.setattr(Toy, "forward", lambda self, *a, **k: plain(self, *a, **k))


def _constant(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    code = Toy.forward.__code__
    other = tuple(2000 if x == 1000 else x for x in code.co_consts)
    made = types.FunctionType(code.replace(co_consts=other), Toy.forward.__globals__)
    monkeypatch.setattr(Toy, "forward", made)


def _torchs(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    plain = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: plain(self, x) * 2)


def _within_torchs(monkeypatch: pytest.MonkeyPatch, kind: type) -> None:
    plain = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, *args: plain(self, *args) * 2)


@pytest.mark.parametrize("patch", [_forward, _constant, _torchs, _within_torchs])
def test_code_counts(monkeypatch: pytest.MonkeyPatch, patch: Any) -> None:
    before = of_denoiser(toy())
    patch(monkeypatch, Toy)
    assert of_denoiser(toy()) != before
    monkeypatch.undo()
    assert of_denoiser(toy()) == before


def test_what_stands_in_a_methods_place_counts() -> None:
    """As in convolutions that are to draw tiles."""
    words = [of_denoiser(toy())]
    for by in (1, 2, 1):
        module = toy()

        def padded(layer: Any, x: Any, weight: Any, bias: Any, by: int = by) -> Any:
            return type(layer)._conv_forward(layer, x, weight, bias) * by

        module.enter._conv_forward = padded.__get__(module.enter)  # type: ignore[method-assign]
        words.append(of_denoiser(module))
    assert len(set(words)) == 3 and words[1] == words[3]


def test_functions_of_a_layers_own_count() -> None:
    words = []
    for act in (torch.relu, torch.tanh, partial(torch.mul, other=2), toy, torch.relu):
        module = toy()
        module._act = act
        words.append(of_denoiser(module))
    assert len(set(words)) == 4 and words[0] == words[4]
    module.compile(backend="eager")  # which calls the same
    assert of_denoiser(module) == words[0]


class Helper:
    """An object that a layer asks for something."""

    def helped(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def test_objects_and_tensors_among_the_attributes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    module = toy()
    words = [of_denoiser(module)]
    module.helper, module.table = Helper(), torch.tensor([1.0, 2.0])
    words.append(of_denoiser(module))
    module.table = torch.tensor([1.0, 3.0])
    words.append(of_denoiser(module))
    module.helper.strength = 2
    words.append(of_denoiser(module))
    monkeypatch.setattr(Helper, "helped", lambda self, x: x + 2)
    words.append(of_denoiser(module))
    assert len(set(words)) == len(words)


def test_what_a_forward_names_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions and numbers, also those that a processor reaches, and attention put in place of
    torch's."""
    unet = tiny_unet()
    before = of_denoiser(unet)
    functional = torch.nn.functional
    attend = functional.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", lambda *a, **k: attend(*a, **k))
        assert of_denoiser(unet) != before

    def helped(self: Any, x: torch.Tensor) -> torch.Tensor:
        return toys.helper(x) * _SCALE

    monkeypatch.setattr(Toy, "forward", helped)
    words = set()
    for add, scale in ((1, 1.0), (2, 1.0), (2, 3.0)):
        code = f"def helper(x): return x + {add}"
        scope: dict[str, Any] = {}
        exec(code, scope)
        monkeypatch.setattr(toys, "helper", scope["helper"], raising=False)
        monkeypatch.setitem(globals(), "_SCALE", scale)
        words.add(of_denoiser(toy()))
    assert len(words) == 3


class Scaling:
    """An object with a number, and a method that has it so."""

    number = 1.0

    def __init__(self, by: float) -> None:
        self.by = by

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


class Table(dict[str, Any]):
    """A dictionary that has an attribute."""


def _table(by: float) -> Table:
    made = Table()
    made.by = by  # type: ignore[attr-defined]
    return made


def _around(by: float) -> Any:
    held = Scaling(by)
    return lambda x: held.scaled(x)


@pytest.mark.parametrize(
    "made",
    [
        *(Scaling, _table, _around),
        *(lambda by: partial(torch.mul, other=by), lambda by: Scaling(by).scaled),
    ],
)
def test_what_an_attribute_has_within_counts(made: Any) -> None:
    words = []
    for by in (1.0, 2.0, 1.0):
        module = toy()
        module.beside = made(by)
        words.append(of_denoiser(module))
    assert words[0] == words[2] != words[1]


#: What changes while a program runs.
_SETTINGS: dict[str, Any] = {"by": 1.0, "object": Scaling(1.0)}


class Reading(nn.Identity):
    """A layer that reads settings of all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x * _SETTINGS["by"] * _SETTINGS["object"].by * Scaling.number
        return out


def test_what_a_forward_reads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = toy()
    module.beside = Reading()
    words = [of_denoiser(module)]
    monkeypatch.setitem(_SETTINGS, "by", 2.0)
    words.append(of_denoiser(module))
    monkeypatch.setattr(_SETTINGS["object"], "by", 2.0)
    words.append(of_denoiser(module))
    monkeypatch.setattr(Scaling, "number", 2.0)
    words.append(of_denoiser(module))
    monkeypatch.undo()
    assert words.index(of_denoiser(module)) == 0
    assert len(set(words)) == 4


class Slots:
    """An object of which attributes do not tell all."""

    __slots__ = ("__dict__", "by")


def test_inputs_count() -> None:
    module = toy()

    def word(**call: Any) -> str:
        return of_graph(module, parse(module, (), toy_call() | call))

    assert word() == word(sample=torch.zeros(2, 4, 8, 8, dtype=torch.float64))
    assert word() != word(sample=torch.zeros(3, 4, 8, 8, dtype=torch.float64))
    assert word() != word(timestep=torch.tensor(3.5))


def test_where_ranks_are_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    words = [
        of_cuts("graph", [cpu, cpu], units, settings)
        for units, settings in (
            (["a", "b"], [2, 1]),
            (["a", "a"], [2, 1]),
            (["a", "b"], [2, 2]),
        )
    ]
    assert len(set(words)) == 3
    assert of_cuts("graph", [cpu, cpu], ["c", "d"], [2, 1]) == words[0]  # called otherwise
    monkeypatch.setattr(key, "versions", lambda: "others")
    assert of_cuts("graph", [cpu, cpu], ["a", "b"], [2, 1]) != words[0]


def test_what_has_no_word_is_said() -> None:
    for change in (
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: setattr(module.mix, "forward", module.mix.forward),
        lambda module: setattr(module, "kept", iter([])),
        lambda module: setattr(module, "kept", [nn.Identity()]),
        lambda module: setattr(module, "kept", Slots()),
    ):
        module = toy()
        change(module)
        with pytest.raises(UnknownError):
            of_denoiser(module)
