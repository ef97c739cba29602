"""What others hang on a denoiser, before the first call and after it: hooks, processors that keep
something, other classes of layers; and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from rotation import often
from tiny_pipelines import draw, tiny_sd
from toys import toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, CaptureError, InputError

STEPS = 4


@pytest.fixture
def pair() -> Any:
    """A pipeline and a parallelised one, alike, all steps exact; and their call."""
    (plain, call), (pipe, _) = tiny_sd(), tiny_sd()
    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=STEPS, split="estimate"):
        yield plain, pipe, call


def test_hooks_of_layers_are_refused(pair: Any) -> None:
    """Whenever they come: before parallelize(), or between two calls."""
    plain, pipe, call = pair
    want = draw(pipe, call)
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        hook = getattr(pipe.unet.mid_block, register)(lambda *_: None)
        with pytest.raises(InputError, match=r"layer mid_block has a forward hook .* remove it"):
            draw(pipe, call)
        hook.remove()
        assert torch.equal(draw(pipe, call), want)
    plain.unet.mid_block.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="layer mid_block has a forward hook"):
        asyncdiff.parallelize(plain, devices=["cpu"] * 2)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(InputError, match="a forward hook for all modules"):
            draw(pipe, call)
    finally:
        hook.remove()


def test_hooks_that_are_put_into_a_registry_are_refused(pair: Any) -> None:
    """Into one of diffusers that was there, on a layer whose forward stays."""
    from diffusers.hooks import HookRegistry, ModelHook

    _, pipe, call = pair
    layer = pipe.unet.mid_block.resnets[0].conv1
    hooks = HookRegistry.check_if_exists_or_initialize(layer).hooks
    want = draw(pipe, call)
    for _ in range(2):
        hooks["mine"] = ModelHook()
        with pytest.raises(InputError, match=r"hooks of diffusers \(mine on mid_block"):
            draw(pipe, call)
        del hooks["mine"]
        assert torch.equal(draw(pipe, call), want)


def test_a_hook_that_a_callback_registers(pair: Any) -> None:
    _, pipe, call = pair

    def register(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == 1:
            pipe.unet.mid_block.register_forward_hook(lambda *_: None)
        return kwargs

    with pytest.raises(InputError, match="layer mid_block has a forward hook"):
        draw(pipe, call, callback_on_step_end=register)


def test_a_hook_of_the_denoiser_runs_once_a_call(pair: Any) -> None:
    """With values, and its result counts."""
    plain, pipe, call = pair
    seen: list[Any] = []

    def change(module: Any, args: Any, output: Any) -> Any:
        seen.append(float(output[0].abs().sum()))
        return (output[0] * 1.1,)

    before, kinds = draw(pipe, call), []
    for p in (plain, pipe):
        p.unet.register_forward_hook(change)
        p.unet.register_forward_pre_hook(lambda module, args: kinds.append(type(args[0])))
    want, got = draw(plain, call), draw(pipe, call)
    assert reference.distance(got, want) < 1e-5 < reference.distance(got, before)
    assert len(seen) == len(kinds) == 2 * STEPS and set(kinds) == {torch.Tensor}


def test_a_layer_of_another_class(pair: Any) -> None:
    plain, pipe, call = pair
    before = draw(pipe, call)

    for p in (plain, pipe):
        layer = p.unet.mid_block.resnets[0]

        class Louder(type(layer)):  # type: ignore[misc]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs) * 1.5

        layer.__class__ = Louder
    got = draw(pipe, call)
    assert reference.distance(got, draw(plain, call)) < 1e-5 < reference.distance(got, before)

    forward = Louder.forward
    Louder.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 0.0  # of all such layers
    Other = type(plain.unet.mid_block.resnets[0])
    Other.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 0.0
    assert reference.distance(draw(pipe, call), got) > 1e-5


STORE: list[Any] = []


def recorders() -> dict[str, Any]:
    """Attention processors that keep something in each call, and where that can be seen."""
    from diffusers.models.attention_processor import AttnProcessor

    kept: list[Any] = []

    class Closed(AttnProcessor):
        def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            kept.append(hidden_states)
            return super().__call__(attn, hidden_states, *args, **kwargs)

    class Global(AttnProcessor):
        def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            STORE.append(hidden_states.mean())
            return super().__call__(attn, hidden_states, *args, **kwargs)

    class Controller:
        def __init__(self) -> None:
            self.maps: dict[str, list[Any]] = {"down": []}
            self.calls = 0

    class Controlled(AttnProcessor):
        def __init__(self) -> None:
            super().__init__()
            self.controller = Controller()

        def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            self.controller.maps["down"].append(hidden_states)
            return super().__call__(attn, hidden_states, *args, **kwargs)

    class Counting(Controlled):
        def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            self.controller.calls += 1
            return AttnProcessor.__call__(self, attn, hidden_states, *args, **kwargs)

    controlled, counting = Controlled(), Counting()
    return {
        "closed": (Closed(), lambda: kept),
        "global": (Global(), lambda: STORE),
        "controlled": (controlled, lambda: controlled.controller.maps["down"]),
        "counting": (counting, lambda: range(counting.controller.calls)),
    }


@pytest.mark.parametrize(
    "which", often(["global", "controlled"], ["closed", "global", "controlled", "counting"])
)
def test_processors_that_keep_something_are_refused(pair: Any, which: str) -> None:
    _, pipe, call = pair
    processor, kept = recorders()[which]
    usual = pipe.unet.attn_processors
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(processor)
    with pytest.raises(CaptureError, match=r"keeps something .*mid_block.*processor"):
        draw(pipe, call)
    assert len(kept()) == 0  # what the export put there is gone
    pipe.unet.set_attn_processor(usual)
    assert draw(pipe, call).isfinite().all()


def test_processors_that_only_compute_are_served(pair: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    plain, pipe, call = pair

    class Scaled(AttnProcessor):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: dict[Any, Any] = {}  # computed once, and looked up then

        def __call__(self, attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            self.shapes[hidden_states.shape] = hidden_states.shape[-1] ** -0.5
            return super().__call__(attn, hidden_states, *args, **kwargs) * 0.5

    for p in (plain, pipe):
        p.unet.set_attn_processor(Scaled())
    assert reference.distance(draw(pipe, call), draw(plain, call)) < 1e-5


@pytest.mark.parametrize("before", [True, False])
def test_layers_that_keep_tensors_are_refused(before: bool) -> None:
    module = toy()
    layer = module.mix
    if before:
        layer.last = None

    def forward(x: torch.Tensor) -> torch.Tensor:
        layer.last = x
        return type(layer).forward(layer, x)

    layer.forward = forward
    denoiser = AsyncDenoiser(module, devices=["cpu"] * 2, split="estimate")
    with pytest.raises(CaptureError, match=r"keeps something in each call \(mix.last\)"):
        denoiser.prepare(**toy_call())
    assert getattr(layer, "last", None) is None
    denoiser.close()


def test_ctrl_c_in_the_middle_of_an_export_stays_that() -> None:
    """Also where a layer keeps something, which is put back."""
    module = toy()
    kept: list[Any] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        raise KeyboardInterrupt

    module.mix.forward = forward
    denoiser = AsyncDenoiser(module, devices=["cpu"] * 2, split="estimate")
    with pytest.raises(KeyboardInterrupt):
        denoiser.prepare(**toy_call())
    assert not kept
    denoiser.close()


def test_layers_that_torch_compiles_are_refused() -> None:
    plain, _ = tiny_sd()
    plain.unet.mid_block.compile(backend="eager")
    with pytest.raises(InputError, match=r"mid_block is compiled by itself .*compile=True"):
        asyncdiff.parallelize(plain, devices=["cpu"] * 2)


def test_gradients_are_refused(pair: Any) -> None:
    """They would be cut without a word."""
    _, pipe, call = pair
    pipe.scheduler.set_timesteps(STEPS)
    text = call["prompt_embeds"]
    latents = call["latents"].clone().requires_grad_()
    wanted = ({"sample": latents}, {"encoder_hidden_states": text.clone().requires_grad_()})
    for time, inputs in zip(pipe.scheduler.timesteps, wanted, strict=False):
        given = {"sample": call["latents"], "encoder_hidden_states": text} | inputs
        with pytest.raises(InputError, match=r"asks for its gradient.*\(restore\(\)\)"):
            pipe.unet(timestep=time, **given)
        with torch.no_grad():
            assert not pipe.unet(timestep=time, **given).sample.requires_grad
