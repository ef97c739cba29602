"""What tests share must not hide what they test: only equal structures share an export."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from export_cache import ExportCache
from tiny_pipelines import tiny_unet
from toys import Toy, toy, toy_call

from asyncdiff.graph.example_inputs import example_inputs
from asyncdiff.integrations.diffusers.subclass import twin

_BATCHED = ("sample", "encoder_hidden_states")


class Exports:
    """How often torch exports, of a few calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = ExportCache()
        self.made = 0
        self.export = self.cache._export
        monkeypatch.setattr(self.cache, "_export", self._made)

    def _made(self, *args: Any, **options: Any) -> Any:
        self.made += 1
        return self.export(*args, **options)

    def __call__(self, module: Any, call: Any) -> int:
        self.made = 0
        for _ in range(2):
            with torch.no_grad():
                self.cache(module, (), call, strict=False)
        return self.made


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> Exports:
    return Exports(monkeypatch)


def test_another_module_gets_its_own_weights_and_a_graph_of_its_own(exports: Exports) -> None:
    first, second = toy(0), toy(5)
    one, two = (exports.cache(x, (), toy_call(), strict=False) for x in (first, second))
    assert exports.made == 1
    assert [n.name for n in one.graph.nodes] == [n.name for n in two.graph.nodes]
    assert not set(one.graph.nodes) & set(two.graph.nodes)
    assert all(x is second.get_parameter(name) for name, x in two.state_dict.items())
    for node in list(one.graph.nodes)[::-1]:  # whoever has one may take it apart
        one.graph.erase_node(node)
    again = exports.cache(first, (), toy_call(), strict=False)
    for module, program in ((second, two), (first, again)):
        torch.testing.assert_close(program.module()(**toy_call()), module(**toy_call()))


def test_what_decides_a_graph_is_exported_again(exports: Exports) -> None:
    unet = tiny_unet()
    call = example_inputs(unet)
    assert exports(unet, call) == 1
    assert exports(tiny_unet(seed=1), call) == exports(twin(unet), call) == 0
    # inputs: constants, batch, dtype
    assert exports(unet, call | {"return_dict": True}) == 1
    larger = {n: call[n].repeat(2, *[1] * (call[n].ndim - 1)) for n in _BATCHED}
    assert exports(unet, call | larger) == 1
    assert exports(unet, call | {"timestep": torch.tensor(3.5)}) == 1
    # weights: dtype, sharing
    assert exports(tiny_unet().double(), call | {n: call[n].double() for n in _BATCHED}) == 1
    shared = tiny_unet()
    shared.conv_in.bias = shared.down_blocks[0].resnets[0].conv1.bias
    assert exports(shared, call) == 1
    # options, processors and their options
    free = tiny_unet()
    free.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert exports(free, call) == 1
    sliced = tiny_unet()
    sliced.set_attention_slice(1)
    assert exports(sliced, call) == 1
    sliced.set_attention_slice(2)
    assert exports(sliced, call) == 1
    assert exports(unet, call) == 0
    fused = tiny_unet()
    fused.fuse_qkv_projections()
    assert exports(fused, call) == 1


def test_a_class_whose_functions_change_is_another(
    exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exports(toy(), toy_call()) == 1
    plain = Toy.forward
    monkeypatch.setattr(Toy, "forward", lambda self, *a, **k: plain(self, *a, **k))
    assert exports(toy(), toy_call()) == 1
    unet = tiny_unet()
    call = example_inputs(unet)
    assert exports(unet, call) == 1
    processor = diffusers.models.attention_processor.AttnProcessor2_0
    there = processor.__call__
    monkeypatch.setattr(processor, "__call__", lambda self, *a, **k: there(self, *a, **k))
    assert exports(unet, call) == 1


class Own(torch.nn.Identity):
    """A layer of a test's own, which may do more than compute."""


class OwnToy(Toy):
    """A denoiser of a test's own."""


def test_what_is_not_known_is_always_exported(exports: Exports) -> None:
    for change in (
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.down[0].register_forward_pre_hook(lambda *_: None),
        lambda module: setattr(module, "mix", torch.nn.Sequential(module.mix, Own())),
        lambda module: setattr(module.mix, "forward", module.mix.forward),
        lambda module: setattr(module, "kept", iter([])),
        lambda module: setattr(module, "__class__", OwnToy),
    ):
        module = toy()
        change(module)
        assert exports(module, toy_call()) == 2
