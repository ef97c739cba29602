"""Small denoisers for tests: seconds to export, milliseconds to run."""

from __future__ import annotations

import torch
from torch import nn


class Toy(nn.Module):
    """A few convolutions with skip connections, a time embedding, conditioning, views that cross
    and a weight that two layers share."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.enter = nn.Conv2d(4, width, 3, padding=1)
        self.time = nn.Linear(2, width)
        self.text = nn.Linear(6, width)
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.up = nn.ModuleList(nn.Conv2d(2 * width, width, 3, padding=1) for _ in range(depth))
        self.mix = nn.Linear(width, width)
        self.down[-1].weight = self.down[0].weight
        self.leave = nn.Conv2d(width, 4, 3, padding=1)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        t = timestep.to(sample.dtype) / 1000
        emb = self.time(torch.stack([t.sin(), t.cos()]).expand(sample.shape[0], 2))
        emb = emb + self.text(encoder_hidden_states).mean(1)
        h = self.enter(sample)
        skips = []
        for layer in self.down:
            h = torch.relu(layer(h) + emb[:, :, None, None])
            skips.append(h)
        tokens = h.flatten(2).transpose(1, 2)  # a view of what crosses
        first, second = self.mix(tokens).chunk(2, dim=1)
        tokens = torch.cat([second, first], dim=1)
        h = tokens.transpose(1, 2).unflatten(2, h.shape[2:])
        for layer in self.up:
            h = torch.tanh(layer(torch.cat([h, skips.pop()], dim=1)) + emb[:, :, None, None])
        return (self.leave(h),)


def toy(seed: int = 0) -> Toy:
    """A Toy with fixed weights, in eval mode, in float64: differences are differences of plan."""
    torch.manual_seed(seed)
    return Toy().double().eval().requires_grad_(False)


def toy_call(batch: int = 2, size: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    """Keyword arguments of one call of a Toy."""
    g = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, size, size, generator=g, dtype=torch.float64),
        "timestep": torch.tensor(900),
        "encoder_hidden_states": torch.randn(batch, 5, 6, generator=g, dtype=torch.float64),
    }
