"""Small denoisers for tests: seconds to export, milliseconds to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


class Attention(nn.Module):
    """One attention between tokens, of text and picture."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.text, self.out = nn.Linear(8, 24), nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        text = self.text(encoder_hidden_states)
        both = torch.cat([text, sample], 1) * (1 + timestep / 1000)
        parts = self.qkv(both).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        return (self.out(mixed[:, text.shape[1] :]),)


def attention() -> Attention:
    """An Attention with fixed weights, in eval mode, in float64."""
    torch.manual_seed(0)
    return Attention().double().eval().requires_grad_(False)


def attention_call(tokens: int = 7) -> dict[str, torch.Tensor]:
    """Keyword arguments of one call of an Attention."""
    text = toy_call()["encoder_hidden_states"]
    sample = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(1)).double()
    return {"sample": sample, "timestep": torch.tensor(900), "encoder_hidden_states": text}


class Block(nn.Module):
    """A transformer block that is modulated by the time and reads the text."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps)
        self.shift = nn.Linear(2, width)
        self.mixing = nn.Linear(width, 3 * width)
        self.text = nn.Linear(6, width)
        self.asking = nn.Linear(width, width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.mixing(self.norm(x) + self.shift(time)[:, None]).chunk(3, dim=-1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        known = self.text(text)
        x = x + nn.functional.scaled_dot_product_attention(self.asking(x), known, known)
        x = x + self.narrow(nn.functional.gelu(self.wide(x)))
        return x, x[:, 1:]  # a view of what it returns besides


class Tower(nn.Module):
    """A diffusion transformer of equal blocks, or of blocks of these widths and epsilons."""

    def __init__(self, depth: int = 6, widths: Sequence[int] = (), eps: Sequence[float] = ()):
        super().__init__()
        widths = widths or [8] * depth
        eps = eps or [1e-5] * len(widths)
        self.enter = nn.Linear(4, widths[0])
        self.blocks = nn.ModuleList(map(Block, widths, eps))
        self.leave = nn.Linear(widths[-1], 4)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        t = timestep.to(hidden_states.dtype).reshape(1) / 1000
        time = torch.stack([t.sin(), t.cos()], dim=-1)
        x = self.enter(hidden_states)
        for block in self.blocks:
            width = block.norm.weight.shape[0]
            if x.shape[-1] != width:
                x = torch.cat([x, x], dim=-1)[..., :width]
            x, most = block(x, time, encoder_hidden_states)
            x = torch.cat([most, x[:, :1]], dim=1)
        return self.leave(x)


def tower(**options: Any) -> Tower:
    """A Tower with fixed weights, in eval mode, in float64."""
    torch.manual_seed(0)
    return Tower(**options).double().eval().requires_grad_(False)


def tower_call() -> dict[str, torch.Tensor]:
    """Keyword arguments of one call of a Tower."""
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 7, 4, generator=g, dtype=torch.float64),
        "timestep": torch.tensor(900),
        "encoder_hidden_states": torch.randn(2, 5, 6, generator=g, dtype=torch.float64),
    }
