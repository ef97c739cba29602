"""Denoisers that cannot be captured, or pipelines that cannot be served: told before they are
prepared, in words that say what to do."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import reference
import torch
from torch import nn
from toys import toy_call

from asyncdiff import AsyncDenoiser, CaptureError

SPLITS: list[Any] = ["estimate", [["transformer_blocks.0"], ["transformer_blocks.1"]]]


@pytest.mark.parametrize("split", SPLITS, ids=["estimate", "by hand"])
def test_sizes_that_depend_on_values(split: Any) -> None:
    """Mochi drops what its mask of tokens drops. By hand it was split, and masks of another number
    of tokens were broadcast into each other."""
    torch.manual_seed(0)
    module = diffusers.MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    ).eval()
    mask = torch.arange(16).expand(2, 16) < torch.tensor([[9], [5]])
    denoiser = AsyncDenoiser(module, devices=["cpu"] * 2, split=split)
    with pytest.raises(CaptureError, match=r"size depends on values .*nonzero.* without asyncdiff"):
        denoiser.prepare(
            hidden_states=torch.randn(2, 4, 2, 8, 8),
            encoder_hidden_states=torch.randn(2, 16, 16),
            timestep=torch.tensor([900.0, 900.0]),
            encoder_attention_mask=mask,
        )
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

    class Reports(nn.Module):
        def forward(self, sample: Any, timestep: Any) -> Any:
            raise RuntimeError("It went wrong here. Please file an issue on github. Or there.")

    for module, words in (
        (Branches(), r"must not branch on values of tensors; else run .* without asyncdiff"),
        (Reports(), r"here\. +Or there\. Try another version of torch .* without asyncdiff"),
    ):
        denoiser = AsyncDenoiser(module, devices=["cpu"], components=1)
        with pytest.raises(CaptureError, match=words) as refused:
            denoiser.prepare(toy_call()["sample"], torch.tensor(9))
        assert "file an issue" not in str(refused.value)
        denoiser.close()
