"""A fixed sample of the families of diffusers, in every run (all: benchmarks/pipelines/run.py)."""

from __future__ import annotations

import pytest
import reference
import torch
from families import FAMILIES, STEPS, model, ones, randn
from rotation import often
from tiny_pipelines import draw

import asyncdiff

#: Tried every time: the most used, and those that are unlike them and quickly exported.
_OFTEN = ("SD 1.5", "SDXL", "ControlNet", "SD3", "FLUX", "FLUX.2", "Wan 2.1", "Qwen-Image", "LTX")
_OFTEN += ("CogVideoX", "CogView3", "Sana", "PixArt", "AuraFlow", "DiT", "Latte")


@pytest.mark.parametrize("name", often(_OFTEN, FAMILIES))
def test_family(name: str) -> None:
    """Exact with all steps exact, near with one, and as it was after ``restore()``."""
    pipe, call = FAMILIES[name]()
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        drawn = draw(pipe, {"num_inference_steps": STEPS} | call)
        return torch.as_tensor(drawn[0] if isinstance(drawn, (list, tuple)) else drawn)

    want = run()
    assert want.isfinite().all()
    handle = asyncdiff.parallelize(
        pipe, devices=["cpu"] * 2, components=2, warmup=99, split="estimate"
    )
    assert reference.distance(run(), want) < 1e-5
    handle.configure(warmup=1)
    near = reference.distance(run(), want)
    assert 0 < near < 2
    handle.restore()
    assert torch.equal(run(), want)


@pytest.mark.slow
def test_a_condition_on_an_input_that_is_all_0() -> None:
    """HunyuanVideo 1.5 asks for the values of an image that is not given."""
    module = model(
        "HunyuanVideo15Transformer3DModel",
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=8,
        image_embed_dim=12, rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    texts = {"encoder_hidden_states": randn(1, 6, 16), "encoder_hidden_states_2": randn(1, 4, 8)}
    masks = {"encoder_attention_mask": ones(1, 6), "encoder_attention_mask_2": ones(1, 4)}
    given = {"hidden_states": randn(1, 9, 2, 2, 2), "image_embeds": torch.zeros(1, 3, 12)}
    call = texts | masks | given | {"timestep": torch.tensor([500.0]), "return_dict": False}
    with torch.no_grad():
        want = module(**call)[0]
    denoiser = asyncdiff.AsyncDenoiser(module, devices=["cpu"] * 2, split="estimate")
    with denoiser.generation([500.0]):
        assert reference.distance(denoiser(**call)[0], want) < 1e-5
    denoiser.close()
