"""The yardstick models: denoisers of 32 x 32 pixels that are told a class.

- ``unet``: Stable Diffusion's block structure (cross-attention to states of the class, predicts
  noise, its noise schedule).
- ``transformer``: a diffusion transformer of Peebles and Xie (DiT, arXiv 2212.09748), diffusers'
  ``DiTTransformer2DModel``, with rectified flow (Liu et al., arXiv 2209.03003).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, DiTTransformer2DModel, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from yardsticks.pictures import CLASSES

KINDS = ("unet", "transformer")
SIDE = 32
NOTHING = len(CLASSES)
"""The label of no class, for guidance."""
STATES, WIDTH = 4, 128
"""Of a class, that the UNet's cross-attention sees: their number and width."""

#: Stable Diffusion's noise schedule, as its repository has it.
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


class ClassEncoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A learned table of states: labels (batch,) -> (batch, states, width)."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, classes: int = NOTHING, states: int = STATES, width: int = WIDTH) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(classes + 1, states, width) * 0.5)

    def forward(self, labels: Tensor) -> Tensor:
        return self.table[labels]


class ConditionedUNet(nn.Module):
    """UNet and class encoder, as they are trained: (pixels, time, labels) -> noise."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=3,
            out_channels=3,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 96, 128),
            layers_per_block=2,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,  # diffusers' name for the number of heads
            norm_num_groups=16,
        )
        self.class_encoder = ClassEncoder()

    def forward(self, noisy: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        states = self.class_encoder(labels)
        out: Tensor = self.denoiser(noisy, time, encoder_hidden_states=states, return_dict=False)[0]
        return out


class ConditionedTransformer(nn.Module):
    """The transformer, as it is trained: (pixels, time, labels) -> velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = DiTTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=64,
            in_channels=3,
            out_channels=3,
            num_layers=12,
            sample_size=SIDE,
            patch_size=2,
            num_embeds_ada_norm=NOTHING,
            norm_num_groups=1,
        )
        for module in self.denoiser.modules():
            # Each block would drop labels by itself; training drops them for all together.
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        self._begin_as_identity()

    def _begin_as_identity(self) -> None:
        """Zeros where DiT begins with zeros, so that every block passes on what it is given."""
        for block in self.denoiser.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)
        for layer in (self.denoiser.proj_out_1, self.denoiser.proj_out_2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, noisy: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.denoiser(noisy, timestep=time, class_labels=labels, return_dict=False)[0]
        return out


def make(kind: str) -> ConditionedUNet | ConditionedTransformer:
    """A model of this kind with random weights."""
    return {"unet": ConditionedUNet, "transformer": ConditionedTransformer}[kind]()
