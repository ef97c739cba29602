"""A denoiser that changes between generations: options, adapters, weights merged into."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import reference
import torch
from export_cache import uncached
from tiny_pipelines import draw, tiny_flux, tiny_sd, tiny_sd3
from toys import tower, toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser
from asyncdiff.graph.capture import capture
from asyncdiff.graph.signature import parse
from asyncdiff.graph.state.module_state import ModuleState
from asyncdiff.graph.weights import Held, Weights
from asyncdiff.integrations.diffusers.subclass import twin as twin_of


def test_options_that_are_set_later() -> None:
    """FreeU sets plain values of blocks. An earlier state is prepared already."""
    (pipe, call), (plain, _) = tiny_sd(), tiny_sd()
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=3, split="estimate")

    def both() -> float:
        got, want = (draw(p, call, num_inference_steps=3) for p in (pipe, plain))
        return reference.distance(got, want)

    assert both() < 1e-5 and len(handle.denoiser._engines) == 1
    for p in (pipe, plain):
        p.enable_freeu(0.9, 0.2, 1.2, 1.4)
    assert both() < 1e-5 and len(handle.denoiser._engines) == 2
    for p in (pipe, plain):
        p.disable_freeu()
    assert both() < 1e-5
    prepared = len(handle.denoiser._engines)
    assert both() < 1e-5 and len(handle.denoiser._engines) == prepared
    handle.restore()


def test_layers_that_are_loaded_later() -> None:
    """Also where the attribute was None before, as that of an adapter's projection is."""
    denoiser = toy()
    denoiser.extra = None
    forward = type(denoiser).forward

    class WithExtra(type(denoiser)):  # type: ignore[misc]
        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            (out,) = forward(self, sample, timestep, encoder_hidden_states)
            return (out if self.extra is None else self.extra(out),)

    denoiser.__class__ = WithExtra
    twin = twin_of(denoiser)
    engine = AsyncDenoiser(twin, devices=["cpu"] * 2, split="estimate", warmup=2)
    call = toy_call()
    latents, text = call["sample"], call["encoder_hidden_states"]

    def near() -> bool:
        with engine.generation([9, 8]):
            got = [engine(latents, torch.tensor(t), text)[0] for t in (9, 8)]
        return all(
            torch.allclose(g, denoiser(latents, torch.tensor(t), text)[0])
            for g, t in zip(got, (9, 8), strict=True)
        )

    assert near()
    denoiser.extra = torch.nn.Conv2d(4, 4, 1).double().requires_grad_(False)
    assert near()
    engine.close()


def test_what_counts_as_another_state() -> None:
    module = toy()
    module.down[1].gains = {"default": 1.0}
    state = ModuleState(module)
    numbers = [state.number()]

    def changed() -> bool:
        numbers.append(state.number())
        return numbers[-1] != numbers[-2]

    assert not changed()
    module.down[1].gains["default"] = 0.5
    assert changed() and not changed()
    module.down[1].gains["default"] = 1.0
    assert changed() and numbers[-1] == numbers[0]
    for scale in (-1.0, -2.0):  # of one hash
        module.down[1].gains["default"] = scale
        assert changed()

    def padded(layer: Any, x: Any, weight: Any, bias: Any) -> Any:
        return type(layer)._conv_forward(layer, x, weight, bias) * 2

    module.enter._conv_forward = padded.__get__(module.enter)  # in a method's place
    assert changed()
    module.enter._conv_forward = padded.__get__(module.enter)
    assert not changed()
    del module.enter._conv_forward
    assert changed() and numbers[-1] == numbers[-4]
    for act in (torch.relu, torch.tanh):
        module.mix._act = act
        assert changed()
    module.compile(backend="eager")
    assert not changed()

    class Processor:
        def __init__(self, gain: float) -> None:
            self.gain = gain

    for gain, new in ((1.0, True), (1.0, False), (2.0, True)):
        module.mix.processor = Processor(gain)
        assert changed() == new
    module.mix._disabled = True  # as adapters have it
    assert changed()
    module.mix._active = ["a"]
    assert changed()
    module.mix._active.append("b")
    assert changed()
    module.mix._hooks = {"other": object()}  # nobody's options
    assert not changed()
    module.mix = torch.nn.Linear(8, 8)
    assert changed()
    module.mix.shift = torch.zeros(3)
    assert changed()
    module.mix.shift = torch.zeros(3)  # tensors are told apart by which they are
    assert changed() and not changed()


def test_methods_of_classes_that_are_replaced_are_of_the_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of layers', of those that theirs are derived from, and of attention processors'; and no other
    attributes of classes."""

    class Scale:
        def __call__(self, x: Any) -> Any:
            return x

    class Convolution(torch.nn.Conv2d):
        calls = 0

        @property
        def gain(self) -> float:
            return 1.0

    module = toy()
    module.down[1] = Convolution(8, 8, 3, padding=1)
    module.mix.processor = Scale()
    state = ModuleState(module)
    number = state.number()
    for cls, name, other in (
        (torch.nn.Conv2d, "_conv_forward", lambda *_: None),
        (Convolution, "_conv_forward", lambda *_: None),  # a method that the class had not itself
        (Convolution, "gain", property(lambda _: 2.0)),
        (torch.nn.modules.conv._ConvNd, "extra_repr", lambda *_: None),
        (Scale, "__call__", lambda *_: None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(cls, name, other)
            assert state.number() != number
        assert state.number() == number
    Convolution.calls += 1
    with monkeypatch.context() as patch:
        patch.setattr(ModuleState, "_moved", None)  # is not asked, since nothing has changed
        assert state.number() == number


def test_a_method_of_a_class_that_is_replaced_is_noticed_by_the_next_generation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uncached(monkeypatch)
    module, call = toy(), toy_call(2)
    original = torch.nn.Conv2d._conv_forward

    def louder(layer: Any, x: Any, weight: Any, bias: Any) -> Any:
        return 1.1 * original(layer, x, weight, bias)

    with contextlib.closing(
        AsyncDenoiser(module, devices=["cpu"] * 2, components=2, split="estimate")
    ) as denoiser:

        def near() -> bool:
            with denoiser.generation([900.0]):
                (found,) = denoiser(**call)
            return torch.allclose(found, module(**call)[0])

        plain = module(**call)[0]
        assert near()
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Conv2d, "_conv_forward", louder)
            assert not torch.allclose(module(**call)[0], plain)
            assert near()
        assert near() and len(denoiser._engines) == 2


def test_hooks_of_diffusers_below_another_one_are_of_the_state() -> None:
    """Where one is taken away, the layer's forward stays."""
    from diffusers.hooks import HookRegistry, ModelHook

    module = toy()
    traced = type("Hook", (ModelHook,), {"__module__": "diffusers.hooks.layer_skip"})
    registry = HookRegistry.check_if_exists_or_initialize(module.down[1])
    for name in ("first", "second"):
        registry.register_hook(traced(), name)
    state = ModuleState(module)
    numbers = [state.number()]
    registry.hooks["second"].strength = 0.5
    numbers.append(state.number())
    registry.remove_hook("first")
    numbers.append(state.number())
    assert len(set(numbers)) == 3 and state.number() == numbers[-1]


def test_other_weights_are_another_version_of_the_same_state() -> None:
    """But not of other shapes, dtypes, or of weights that were shared."""
    module = toy()
    state = ModuleState(module)
    number, versions = state.number(), {state.version}
    first = module.mix
    for make in (lambda: torch.nn.Linear(8, 8).double(), lambda: torch.nn.Linear(8, 8).double()):
        module.mix = make().eval()
        assert state.number() == number and state.version not in versions
        versions.add(state.version)
    module.mix = first
    assert state.version == min(versions)
    module.mix.weight = torch.nn.Parameter(torch.zeros(8, 8).double())
    assert state.number() == number and state.version not in versions
    assert state.structure.tensors["mix.weight"] is module.mix.weight
    module.mix.weight = torch.nn.Parameter(torch.zeros(8, 8))
    assert state.number() != number
    module.mix.weight = torch.nn.Parameter(torch.zeros(8, 8).double())
    assert state.number() == number
    module.down[-1].weight = torch.nn.Parameter(module.down[-1].weight.clone())
    assert state.number() != number
    module.down[-1].weight = module.down[0].weight
    assert state.number() == number


def test_what_numbers_are_inputs_of_a_graph() -> None:
    """Those that are multiplied with; what they are compared with is asked again of others."""

    class Processor(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = [0.25, 3.0]

        def forward(self, x: Any) -> Any:
            first, second = self.scale
            x = x + first * x if first != 0 else x * 7.0
            return torch.nn.functional.leaky_relu(x, second)

    module = toy()
    module.mix.processor = Processor()
    forward = type(module).forward

    class Scaled(type(module)):  # type: ignore[misc]
        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            (x,) = forward(self, sample, timestep, encoder_hidden_states)
            return (self.mix.processor(x),)

    module.__class__ = Scaled
    scale, state = module.mix.processor.scale, ModuleState(module)
    captured = capture(module, parse(module, (), toy_call()))
    assert module.mix.processor.scale is scale and scale == [0.25, 3.0]
    assert captured.guards.frozen == {"mix.processor.scale.1"}
    assert captured.guards.comparisons["mix.processor.scale.0"] == {("ne", 0.0): None}
    (name,) = (n for n, p in captured.places.items() if p == "mix.processor.scale.0")
    assert float(captured.weights[name]) == 0.25
    state.learn(captured.guards)
    number = state.number()
    scale[0] = -8.0
    assert state.number() == number
    captured.follow(state.structure)
    assert float(captured.weights[name]) == -8.0
    scale[0] = 0.0
    assert state.number() != number
    scale[0] = None
    assert state.number() != number and "mix.processor.scale.0" not in state.structure.slots
    scale[0] = -8.0
    assert state.number() == number
    before, version = state.structure, state.version
    scale[0] = 0.5
    assert state.version != version and state.structure is before  # nothing else was looked at
    scale[0] = -8.0
    assert state.version == version
    scale[:] = [1.0, 2.0]
    assert state.number() != number


def test_a_graph_for_which_nothing_was_compared_changes_no_state() -> None:
    """The layers are then compared with what they were; what exporting them has left is seen."""
    module = toy()
    state = ModuleState(module)
    number, before = state.number(), state.structure
    with state.settled():
        captured = capture(module, parse(module, (), toy_call()))
        state.learn(captured.guards)
        assert state.number() == number
        assert state.structure is before
        module.mix.left_behind = 1
        state.learn(captured.guards)
        assert state.number() != number
    assert state.structure is not before


def test_where_the_weights_lie_is_no_other_state() -> None:
    """Those of a denoiser leave its GPU when ranks have them: it is not prepared again, whenever
    it is looked at next."""
    module = tower()
    state = ModuleState(module)
    number, version = state.number(), state.version
    module.to("meta")
    assert state.number() == number and state.version != version


def test_a_weight_that_was_merged_into_is_copied_anew() -> None:
    """What is fused goes into the same parameter, in other memory."""
    module = toy()
    captured = capture(module, parse(module, (), toy_call()))
    weights = Weights(module)
    name, weight = next(iter(captured.weights.items()))
    here = torch.device("cpu")
    first = weights.get(captured, name, here)
    assert weights.get(captured, name, here) is first
    weight.data = weight.data + 1
    captured = capture(module, parse(module, (), toy_call()))
    second = weights.get(captured, name, here)
    assert torch.equal(second.tensor, weight) and not torch.equal(first.tensor, weight)
    assert weights.renew(captured, {name: first}, set()) == {name: second}
    # Where the copy is elsewhere, and the same memory is written to, unseen by torch.
    copy = Held(weight.detach().clone(), weight, shared=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "_shared", staticmethod(lambda weight, device: False))
        weights._held[captured.places[name], here] = copy
        weight.data += 1
        assert weights.renew(captured, {name: copy}, set()) == {}
        assert not torch.equal(copy.tensor, weight)
        for written in ({id(weight)}, None):
            weight.data += 1
            assert weights.renew(captured, {name: copy}, written) == {}
            assert torch.equal(copy.tensor, weight)
        weight.data += 1
        captured = capture(module, parse(module, (), toy_call()))
        weights.look(captured)
        assert weights.get(captured, name, here) is copy and torch.equal(copy.tensor, weight)


@pytest.mark.parametrize("make", [tiny_flux, tiny_sd3])
def test_the_same_pipeline_is_prepared_once(make: Any) -> None:
    pipe, call = make()
    pipe.set_progress_bar_config(disable=True)
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, components=2, split="estimate")
    for _ in range(3):
        pipe(**call, num_inference_steps=3, output_type="latent")
        assert len(handle.denoiser._engines) == 1
    handle.restore()


def test_a_copy_of_a_denoiser_is_its_own() -> None:
    module = toy()
    twin = twin_of(module)
    assert twin.__dict__ is module.__dict__ and copy.deepcopy(twin).__dict__ is not twin.__dict__


def test_a_generation_looks_at_all_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = AsyncDenoiser(toy(), devices=["cpu"] * 2, components=2, split="estimate")
    call, looks = toy_call(2), []
    unchanged = ModuleState._unchanged
    monkeypatch.setattr(ModuleState, "_unchanged", lambda s: looks.append(1) or unchanged(s))
    with contextlib.closing(denoiser):
        for _ in range(2):
            looks.clear()
            with denoiser.generation([0.5, 0.25]):
                for _ in range(2):
                    denoiser(**call)
        assert len(looks) == 1
