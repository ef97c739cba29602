"""What tests share must not hide what they test: only equal structures share an export."""

from __future__ import annotations

from typing import Any

import export_cache
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models import attention_processor
from export_cache import ExportCache, UnknownError, structure
from rotation import often
from tiny_pipelines import draw, tiny_flux, tiny_sd, tiny_unet
from toys import Toy, toy, toy_call

import asyncdiff
from asyncdiff.graph.example_inputs import example_inputs
from asyncdiff.integrations.diffusers.subclass import twin


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


def test_code_of_an_exported_graph_is_there_when_it_is_asked_for(exports: Exports) -> None:
    module = toy()
    for _ in range(2):  # as it was exported, and as a copy
        program = exports.cache(module, (), toy_call(), strict=False)
        graph = program.graph_module
        assert "torch.ops.aten.conv2d" in graph.code
        assert graph.recompile().src == graph.code
        whole = torch.export.unflatten(exports.cache(module, (), toy_call(), strict=False))
        torch.testing.assert_close(whole(**toy_call()), module(**toy_call()))


def test_inputs_and_weights_decide(exports: Exports) -> None:
    call = toy_call()
    assert exports(toy(), call) == 1
    assert exports(toy(seed=1), call) == exports(twin(toy()), toy_call(seed=3)) == 0
    assert exports(toy(), toy_call(batch=3)) == exports(toy(), toy_call(size=4)) == 1
    assert exports(toy(), call | {"timestep": torch.tensor(3.5)}) == 1
    single = {n: x.float() if x.is_floating_point() else x for n, x in call.items()}
    assert exports(toy().float(), single) == 1
    shared = toy()
    shared.up[1].bias = shared.up[0].bias
    assert exports(shared, call) == 1
    assert exports(toy(), call) == 0


def test_options_and_processors_decide() -> None:
    unet = tiny_unet()
    call = example_inputs(unet)
    found = {structure(unet, (), call), structure(unet, (), call | {"return_dict": True})}
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    found.add(structure(unet, (), call))
    unet.set_attn_processor(attention_processor.AttnProcessor())
    found.add(structure(unet, (), call))
    assert len(found) == 4
    one, two = (export_cache._frozen(attention_processor.SlicedAttnProcessor(n)) for n in (1, 2))
    assert one != two


def test_a_class_whose_functions_change_is_another(
    exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exports(toy(), toy_call()) == 1
    plain = Toy.forward
    monkeypatch.setattr(Toy, "forward", lambda self, *a, **k: plain(self, *a, **k))
    assert exports(toy(), toy_call()) == 1
    unet = tiny_unet()
    before = structure(unet, (), call := example_inputs(unet))
    processor = attention_processor.AttnProcessor2_0
    there = processor.__call__
    monkeypatch.setattr(processor, "__call__", lambda self, *a, **k: there(self, *a, **k))
    assert structure(unet, (), call) != before


@pytest.mark.parametrize("make", often([tiny_sd], [tiny_sd, tiny_flux]))
def test_what_the_drop_in_hangs_on_a_denoiser_is_no_part_of_it(
    exports: Exports, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    """Nor is what diffusers does, where a pipeline names its calls."""
    exports.cache.install(monkeypatch)
    for _ in range(2):
        pipe, call = make()
        with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, components=2, split="estimate"):
            draw(pipe, call | {"num_inference_steps": 2})
    assert exports.made == 1


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
        lambda module: HookRegistry.check_if_exists_or_initialize(module.mix).register_hook(
            ModelHook(), "mine"
        ),
        lambda module: setattr(module, "kept", iter([])),
        lambda module: setattr(module, "__class__", OwnToy),
    ):
        module = toy()
        change(module)
        with pytest.raises(UnknownError):
            structure(module, (), toy_call())
    assert exports(module, toy_call()) == 2
