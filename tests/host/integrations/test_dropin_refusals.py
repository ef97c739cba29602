"""Denoisers that cannot be captured, or pipelines that cannot be served: told before they are
prepared, in words that say what to do."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import reference
import torch
from tiny_pipelines import tiny_unet
from torch import nn
from toys import toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, CaptureError


class Masked(nn.Module):
    """Drops the tokens that its mask drops."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(
        self, hidden_states: Any, encoder_hidden_states: Any, timestep: Any,
        encoder_attention_mask: Any,
    ) -> tuple[torch.Tensor]:  # fmt: skip
        text = encoder_hidden_states[encoder_attention_mask]
        x = self.first(hidden_states) * timestep[:, None] + text.mean(0)
        return (self.second(x.tanh()) + text.softmax(0).amax(0),)


def masked() -> tuple[nn.Module, dict[str, Any]]:
    call = {"hidden_states": torch.randn(2, 4), "encoder_hidden_states": torch.randn(2, 16, 4)}
    return Masked(), call


def mochi() -> tuple[nn.Module, dict[str, Any]]:
    module = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    shapes = {"hidden_states": (2, 4, 2, 8, 8), "encoder_hidden_states": (2, 16, 16)}
    return module, {name: torch.randn(*shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("make", "split"),
    [
        (masked, "estimate"),
        (masked, [["first"], ["second"]]),
        pytest.param(mochi, "estimate", marks=pytest.mark.slow),
        pytest.param(
            mochi, [["transformer_blocks.0"], ["transformer_blocks.1"]], marks=pytest.mark.slow
        ),
    ],
)
def test_sizes_that_depend_on_values_of_masks(make: Any, split: Any) -> None:
    """Mochi drops what its mask of tokens drops: it is prepared for each mask."""
    torch.manual_seed(0)
    module, call = make()
    module.eval()
    call["timestep"] = torch.tensor([900.0, 900.0])
    masks = [torch.arange(16).expand(2, 16) < torch.tensor([[a], [b]]) for a, b in ((9, 5), (3, 7))]
    denoiser = AsyncDenoiser(module, devices=["cpu"] * 2, split=split)
    for count, mask in ((1, masks[0]), (2, masks[1]), (2, masks[0])):
        given = call | {"encoder_attention_mask": mask}
        with torch.no_grad(), denoiser.generation([900.0]):
            torch.testing.assert_close(denoiser(**given)[0], module(**given)[0])
        assert len(denoiser._engines) == count
    mask[:, 0] = False  # written to: other values
    given = call | {"encoder_attention_mask": mask}
    with torch.no_grad(), denoiser.generation([900.0]):
        torch.testing.assert_close(denoiser(**given)[0], module(**given)[0])
    denoiser.close()


class Drops(nn.Module):
    """Works on the latents that are above zero."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample[sample > 0] * timestep


def test_sizes_that_depend_on_values_of_latents() -> None:
    denoiser = AsyncDenoiser(Drops().eval(), devices=["cpu"], components=1)
    with pytest.raises(CaptureError, match=r"size depends on values .*index.* without asyncdiff"):
        denoiser.prepare(torch.randn(2, 4), torch.tensor(9.0))
    denoiser.close()


def test_conditions_of_allegro_apart() -> None:
    """Its tables of rotary frequencies have as many rows as a batch, or twice that."""
    torch.manual_seed(0)
    module = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=24,
    ).eval()
    grids = [torch.arange(32)[None] // n % m for n, m in ((16, 2), (4, 4), (1, 4))]
    tables = [(torch.randn(m, 4), torch.randn(m, 4)) for m in (2, 4, 4)]
    call = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(2, 6, 24),
        "timestep": torch.tensor([900, 900]),
        "encoder_attention_mask": torch.ones(2, 6, dtype=torch.long),
        "image_rotary_emb": (tuple(tables), tuple(grids)),
        "return_dict": False,
    }
    with torch.no_grad():
        want = module(**call)[0]
    denoiser = AsyncDenoiser(module, devices=["cpu"] * 4, split="estimate", guidance="split")
    with torch.no_grad(), denoiser.generation([900]):
        assert reference.distance(denoiser(**call)[0], want) < 1e-5
    denoiser.close()


def test_words_of_the_exporter_say_what_to_do() -> None:
    """They asked to report to others what nobody there could mend."""

    class Branches(nn.Module):
        def forward(self, sample: Any, timestep: Any) -> Any:
            return sample if bool((sample > 0).all()) else -sample

    text = "It went wrong here. Please file an issue on github. Or there."

    class Reports(nn.Module):
        def forward(self, sample: Any, timestep: Any) -> Any:
            if torch.compiler.is_exporting():
                raise RuntimeError(text)
            return sample

    for module, words in (
        (Branches(), r"must not branch on values of tensors; else run .* without asyncdiff"),
        (Reports(), r"here\. +Or there \(in its forward: raise .*\)\. Try .* without asyncdiff"),
    ):
        denoiser = AsyncDenoiser(module, devices=["cpu"], components=1)
        with pytest.raises(CaptureError, match=words) as refused:
            denoiser.prepare(toy_call()["sample"], torch.tensor(9))
        assert "file an issue" not in str(refused.value)
        denoiser.close()


class Twice:
    """A pipeline that calls its denoiser in several places, by what is asked for."""

    def __init__(self) -> None:
        self.unet = tiny_unet()
        self.scheduler = diffusers.DDIMScheduler()
        self.scale = 1.0

    @property
    def guides(self) -> bool:
        return self.scale > 1

    @torch.no_grad()
    def __call__(
        self, negative: Any = None, late: bool = False, first: bool = False, scale: float = 1.0
    ) -> torch.Tensor:
        self.scale = scale
        latents, text = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 32)
        self.scheduler.set_timesteps(4)
        unet = self.unet
        for t in self.scheduler.timesteps:
            if late:
                latents = self.unet(latents, t, text).sample
            elif first:
                latents = self.unet(latents, t, text)[0]
            else:
                latents = unet(
                    latents,
                    t,
                    text,
                ).sample
            if self.guides and negative is not None:
                latents = latents + self.unet(latents, t, negative).sample
            often = [negative] if late and negative is not None else []
            for other in often:
                latents = latents + self.unet(latents, t, other).sample
        return latents


@pytest.mark.parametrize("quality", [None, pytest.param("exact", marks=pytest.mark.slow)])
def test_pipelines_that_call_twice_in_a_step(quality: str | None) -> None:
    """Whether or not their code tells beforehand, and with a scheduler that takes no steps."""
    pipe, text = Twice(), torch.randn(1, 8, 32)
    settings: dict[str, Any] = {"components": 2, "warmup": 4}
    if quality is not None:
        settings = {"quality": quality}
    calls: dict[int, tuple[dict[str, Any], ...]] = {
        1: ({}, {"negative": text}, {"scale": 2.0}, {"late": True}, {"first": True}),
        2: ({"negative": text, "scale": 2.0}, {"negative": text, "late": True}),
    }
    for count, given in ((c, g) for c, every in calls.items() for g in every):
        torch.manual_seed(0)
        want = pipe(**given)
        with asyncdiff.parallelize(
            pipe, devices=["cpu"] * 2, split="estimate", **settings
        ) as handle:
            torch.manual_seed(0)
            torch.testing.assert_close(pipe(**given), want)
            assert handle.report().steps == 4 and handle.report().branches == count
