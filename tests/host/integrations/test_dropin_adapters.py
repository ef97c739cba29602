"""Adapters that are loaded, scaled, switched, fused and replaced between calls: what is computed is
followed, and only another structure is prepared anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import reference
import torch
from tiny_pipelines import draw, tiny_flux, tiny_sd, tiny_unet

import asyncdiff
from asyncdiff.graph.weights import Weights
from asyncdiff.runtime.cutting import cutter

peft = pytest.importorskip("peft")

TIMES = (9, 8)
LAYERS = ["mix", "text"]


class Denoiser(diffusers.ModelMixin, diffusers.ConfigMixin, diffusers.loaders.PeftAdapterMixin):
    """A small one that diffusers loads adapters into."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)
        self.mix, self.text = torch.nn.Linear(8, 8), torch.nn.Linear(6, 8)

    def forward(
        self, sample: Any, timestep: Any, encoder_hidden_states: Any, attention_kwargs: Any = None
    ) -> Any:
        scale = (attention_kwargs or {}).get("scale", 1.0)
        diffusers.utils.scale_lora_layers(self, scale)
        x = torch.tanh(self.enter(sample) + self.text(encoder_hidden_states) + timestep / 1000)
        x = self.leave(torch.tanh(self.mix(x)))
        diffusers.utils.unscale_lora_layers(self, scale)
        return (x,)


def small() -> Any:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


def add(unet: Any, name: str, rank: int = 4) -> None:
    torch.manual_seed(sum(map(ord, name)))
    config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=LAYERS, init_lora_weights=False)
    unet.add_adapter(config, name)


def replace(unet: Any) -> None:
    """By another one of the same rank."""
    unet.delete_adapters("b")
    add(unet, "c")
    unet.set_adapters(["c"], [0.4])


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each export."""
    made: list[int] = []
    capture = cutter.capture

    def counted(*args: Any) -> Any:
        made.append(1)
        return capture(*args)

    monkeypatch.setattr(cutter, "capture", counted)
    return made


#: What is done between two calls, and how often that exports the denoiser.
CHANGES: list[tuple[Callable[[Any], None], int]] = [
    (lambda unet: add(unet, "a"), 1),
    *((lambda unet, by=by: unet.set_adapters(["a"], [by]), 0) for by in (0.5, 0.0, 1.0, -0.3)),
    (lambda unet: add(unet, "b"), 0),
    (lambda unet: unet.set_adapters(["a"], [0.7]), 0),
    (lambda unet: unet.set_adapters(["b"], [0.8]), 0),
    (lambda unet: unet.set_adapters(["a", "b"], [0.6, 0.2]), 1),
    (lambda unet: unet.set_adapters(["b", "a"], [0.3, 0.9]), 0),
    (lambda unet: unet.set_adapters(["b"], [0.8]), 0),
    (lambda unet: unet.disable_adapters(), 0),
    (lambda unet: unet.enable_adapters(), 0),
    (lambda unet: unet.fuse_lora(0.5), 0),
    (lambda unet: unet.unfuse_lora(), 0),
    (lambda unet: unet.fuse_lora(1.5), 0),
    (lambda unet: unet.disable_adapters(), 0),  # takes out what was fused
    (lambda unet: unet.enable_adapters(), 0),
    (lambda unet: unet.delete_adapters("a"), 0),
    (replace, 0),
    (lambda unet: unet.fuse_lora(1.0), 0),
    (lambda unet: unet.unload_lora(), 0),  # what was fused stays
    (lambda unet: add(unet, "d", rank=2), 1),
]


@pytest.mark.parametrize("copied", [False, True])
def test_what_is_done_to_adapters(
    copied: bool, exports: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if copied:
        monkeypatch.setattr(Weights, "_shared", staticmethod(lambda weight, device: False))
    module, plain = small(), small()
    x, text = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    with_ranks = asyncdiff.AsyncDenoiser(module, devices=["cpu"] * 2, split="estimate", warmup=2)
    seen = set()
    for at, (change, prepared) in enumerate([(lambda unet: None, 1), *CHANGES]):
        for unet in (module, plain):
            change(unet)
        exports.clear()
        want = plain(x, torch.tensor(8), text)[0]
        with with_ranks.generation(TIMES):
            for t in TIMES:
                (got,) = with_ranks(x, torch.tensor(t), text)
        torch.testing.assert_close(got, want, msg=str(at))
        assert len(exports) == prepared, at
        seen.add(round(float(want.detach()[0, 0, 0]), 5))
    assert len(seen) > 12  # they are others indeed
    with_ranks.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_a_call(dtype: torch.dtype, exports: list[int]) -> None:
    """A slider: one export for 1 and one for all other values but 0, in bfloat16 to the bit."""
    module = small().to(dtype)
    plain = small().to(dtype)
    for unet in (module, plain):
        add(unet, "a")
        unet.set_adapters(["a"], [0.7])
    module.to(dtype), plain.to(dtype)
    x, text = torch.randn(2, 3, 6, dtype=dtype), torch.randn(2, 3, 6, dtype=dtype)
    with_ranks = asyncdiff.AsyncDenoiser(module, devices=["cpu"] * 2, split="estimate", warmup=2)
    for by in (1.0, 0.3, -0.9, 0.123, 1.0, 2.0):
        options = {"attention_kwargs": {"scale": by}}
        want = plain(x, torch.tensor(8), text, **options)[0]
        with with_ranks.generation(TIMES):
            for t in TIMES:
                (got,) = with_ranks(x, torch.tensor(t), text, **options)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 if dtype is torch.float32 else 0)
    assert len(exports) == 2
    with_ranks.close()


class Shifted(Denoiser):
    """What is done with the scale is more than to multiply with it."""

    def forward(
        self, sample: Any, timestep: Any, encoder_hidden_states: Any, attention_kwargs: Any = None
    ) -> Any:
        (x,) = super().forward(sample, timestep, encoder_hidden_states)
        return (x + float(attention_kwargs["scale"]),)


def test_scales_of_a_call_that_no_graph_has_as_an_input(exports: list[int]) -> None:
    module = Shifted().eval().requires_grad_(False)
    x, text = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    with_ranks = asyncdiff.AsyncDenoiser(module, devices=["cpu"] * 2, split="estimate", warmup=2)
    for by, prepared in ((0.3, 2), (0.4, 1), (0.3, 0)):
        options = {"attention_kwargs": {"scale": by}}
        exports.clear()
        with with_ranks.generation(TIMES):
            for t in TIMES:
                (got,) = with_ranks(x, torch.tensor(t), text, **options)
        torch.testing.assert_close(got, module(x, torch.tensor(8), text, **options)[0])
        assert len(exports) == prepared
    with_ranks.close()


@pytest.mark.slow
def test_a_pipeline_whose_adapters_change(exports: list[int]) -> None:
    (pipe, call), (plain, _) = tiny_sd(), tiny_sd()
    layers = ["to_q", "to_v"]
    for p in (pipe, plain):
        p.register_modules(text_encoder=tiny_unet())  # of which the pipeline scales adapters, too

    def add(unet: Any) -> None:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=layers, init_lora_weights=False)
        unet.add_adapter(config, "a")

    with asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=4, split="estimate"):
        assert reference.distance(draw(pipe, call), draw(plain, call)) < 1e-5
        for change, prepared in ((add, 1), (lambda u: u.set_adapters(["a"], [0.4]), 0)):
            exports.clear()
            for p in (pipe, plain):
                change(p.unet)
            assert reference.distance(draw(pipe, call), draw(plain, call)) < 1e-5
            assert len(exports) == prepared
        for by in (0.3, 0.9):
            options = {"cross_attention_kwargs": {"scale": by}}
            got, want = (draw(p, call, **options) for p in (pipe, plain))
            assert reference.distance(got, want) < 1e-5
        assert len(exports) == 1
        for p in (pipe, plain):
            p.unet.fuse_lora()
        assert reference.distance(draw(pipe, call), draw(plain, call)) < 1e-5
        assert len(exports) == 1
    assert reference.distance(draw(pipe, call), draw(plain, call)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers, components", [(["to_q", "to_k", "to_v", "to_out.0"], 2), (["to_q"], 4)]
)
def test_cuts_where_the_scale_is_an_argument(layers: list[str], components: int) -> None:
    """Nodes that had the names of cuts are others where a scale is given, or lie elsewhere: other
    cuts are made."""
    pipe, call = tiny_flux()
    pipe.transformer.eval().requires_grad_(False)
    config = peft.LoraConfig(r=4, target_modules=layers, init_lora_weights=False)
    pipe.transformer.add_adapter(config, "a")
    scaled = {"joint_attention_kwargs": {"scale": 0.3}, "num_inference_steps": 2}
    want = draw(pipe, call, **scaled)
    settings = {"components": components, "warmup": 2, "split": "estimate"}
    with asyncdiff.parallelize(pipe, devices=["cpu"] * components, **settings):
        draw(pipe, call, num_inference_steps=2)
        torch.testing.assert_close(draw(pipe, call, **scaled), want)
