"""Denoisers whose tokens are shared out among ranks compute what they compute whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sequence
import torch
from families import FAMILIES
from rotation import often
from torch import nn

from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.signature import Call, parse
from asyncdiff.sequence.axis import Axis
from asyncdiff.sequence.merging import across
from asyncdiff.sequence.nodes import operation
from asyncdiff.sequence.sharding import ATTENTION, Sharding, shard
from asyncdiff.sequence.shares import even, joint

#: Of each family the attention in which picture tokens meet, and what is computed whole although
#: tokens come in, which is how the picture is put together in the end.
SERVED: dict[str, tuple[int, list[str]]] = {
    "FLUX": (4, []),
    "FLUX.2": (2, []),
    "SD3": (3, ["reshape"]),
    "Qwen-Image": (2, []),
    "Wan 2.1": (2, []),
    "LTX": (2, []),
    "CogVideoX": (2, []),
    "Hunyuan Video": (2, ["view"]),
    "Chroma": (2, []),
    "CogView4": (2, ["view"]),
    "PixArt": (2, ["reshape"]),
    "AuraFlow": (2, ["reshape"]),
    "Ovis": (2, []),
}


def _check(captured: Captured, call: Call, sharding: Sharding, expected: Any, ranks: int) -> int:
    """Every rank has the same result; how often all had to meet for it."""
    met, longest = set(), sharding.longest()
    for decide in (even, joint):
        shares = decide(() if longest is None else longest.segments, ranks, {})
        outputs, gatherer = sequence.run(
            captured, sharding, shares, sequence.values(captured, call)
        )
        for found in outputs:
            for got, wanted in zip(found, expected, strict=True):
                most = 1e-5 * float(wanted.abs().max())
                torch.testing.assert_close(got, wanted, rtol=0, atol=most)
        met.add(gatherer.count)
    (count,) = met
    return count


#: Those that are tried every time.
_OFTEN = ("FLUX", "SD3", "Qwen-Image", "Wan 2.1", "LTX", "CogVideoX")


@pytest.mark.parametrize("name", often(_OFTEN, SERVED))
def test_families(name: str) -> None:
    captured, call, expected = sequence.of_family(name)
    sharding = shard(captured)
    attention, whole = SERVED[name]
    assert len(sharding.attention) == attention
    assert [operation(n) for n in sharding.unknown] == whole
    for ranks in (2, 3, 4):  # keys and values at each, and the result
        assert _check(captured, call, sharding, expected, ranks) == 2 * attention + 1
    # What depends on the latents and is computed whole is what comes before the tokens, or after.
    heavy = [n for n in captured.nodes if n in captured.variant and operation(n) == "linear"]
    tokens = max(n.meta["val"].shape[-2] if n.meta["val"].dim() > 2 else 1 for n in heavy)
    for node in heavy:
        value = node.meta["val"]
        if value.dim() > 2 and value.shape[-2] == tokens > 1:
            assert sharding.axis(node) is not None or node in sharding.entries, node


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVED)
def test_families_in_half_precision(name: str) -> None:
    """Where diffusers clips values, and casts them; nothing is computed."""
    captured, call, _ = sequence.of_family(name)
    module = FAMILIES[name]()[0].transformer.to("meta", torch.float16)
    tensors = [t.half() if t.is_floating_point() else t for t in call.tensors]
    half = capture(module, parse(module, (), call.kwargs(tensors)))
    plain, found = shard(captured), shard(half)
    assert len(found.attention) == len(plain.attention)
    assert [operation(n) for n in found.unknown] == [operation(n) for n in plain.unknown]


# ---- what no family has --------------------------------------------------------------------------


class _Toy(nn.Module):
    """Attention, and something else between two linear layers."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.between = between
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        split = self.qkv(sample).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(*split.unbind(0))
        out = out.transpose(1, 2).flatten(2)
        return (sample + self.out(self.between(out)) * timestep,)


class _Products(nn.Module):
    """Linear layers as quantised ones are: products of matrices, of the tokens of all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.toy, self.bias = _Toy(nn.Identity()), nn.Parameter(torch.randn(8))
        self.weight, self.scale = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        rows = torch.mm(sample.reshape(-1, 8), self.weight) * self.scale
        (mixed,) = self.toy(rows.view(sample.shape), timestep)
        return (torch.addmm(self.bias, mixed.view(-1, 8), self.weight).view(sample.shape),)


class _Masked(nn.Module):
    """Text and picture in one sequence, with a mask of keys, one of queries and keys, or none but
    causal."""

    def __init__(self, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.text, self.qkv = nn.Parameter(torch.randn(1, 5, 8)), nn.Linear(8, 24)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        both = torch.cat([self.text, sample], 1)
        parts = self.qkv(both).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        causal = self.mask is None
        out = nn.functional.scaled_dot_product_attention(*parts, self.mask, is_causal=causal)
        return (sample * timestep + out.transpose(1, 2).flatten(2)[:, 5:],)


class _Modulated(nn.Module):
    """What each token is scaled and shifted by comes in one tensor, as where reference pictures
    have a time of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.toy = nn.Parameter(torch.randn(1, 6, 16)), _Toy(nn.Identity())

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        scale, shift = (self.each * timestep).chunk(2, -1)
        return (self.toy(sample, timestep)[0] * scale + shift,)


def _run(module: nn.Module, shape: tuple[int, ...], ranks: int) -> tuple[Sharding, int]:
    torch.manual_seed(0)
    module = module.eval()
    sample, timestep = torch.randn(shape), torch.tensor(3.0)
    call = parse(module, (sample, timestep), {})
    captured = capture(module, call)
    sharding = shard(captured)
    with torch.no_grad():
        expected = module(sample, timestep)
    return sharding, _check(captured, call, sharding, expected, ranks)


@pytest.mark.parametrize("tokens", [2, 7, 16])
def test_uneven_shares(tokens: int) -> None:
    sharding, met = _run(_Toy(torch.nn.functional.gelu), (2, tokens, 8), 3)
    assert not sharding.unknown and met == 3
    assert {a for a in sharding.axes.values() if isinstance(a, Axis)} >= {Axis(1, (tokens,))}


def test_parts_of_what_is_whole_are_shared_out_each_by_itself() -> None:
    sharding, met = _run(_Modulated(), (2, 6, 8), 2)
    assert not sharding.unknown and met == 3


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_products_of_the_tokens_of_all_samples(batch: int) -> None:
    sharding, met = _run(_Products(), (batch, 7, 8), 3)
    assert not sharding.unknown and met == 3
    of_all = Axis(0, (7,) * batch)
    for node, axis in sharding.axes.items():
        if operation(node) in ("mm", "addmm"):
            assert axis == of_all


def test_across_a_view() -> None:
    both = Axis(1, (5, 7))
    assert across(both, (2, 12, 8), (24, 8)) == Axis(0, (5, 7, 5, 7))
    assert across(Axis(0, (5, 7, 5, 7)), (24, 8), (2, 12, 2, 4)) == both
    assert across(Axis(0, (12, 12)), (24, 8), (2, 12, 8)) == Axis(1, (12,))
    assert across(Axis(0, (24,)), (24, 8), (2, 12, 8)) is None  # shares are not in each sample
    assert across(both, (2, 12, 8), (2, 96)) is None  # each token is several values then
    assert across(both, (2, 12, 8), (3, 8, 8)) is None
    assert across(Axis(2, (6,)), (2, 1, 6, 8), (12, 8)) == Axis(0, (6, 6))


def test_what_mixes_tokens_is_computed_whole_and_named() -> None:
    sharding, met = _run(_Toy(lambda x: x.cumsum(1)), (1, 6, 8), 2)
    assert [operation(n) for n in sharding.unknown] == ["cumsum"]
    assert met == 4  # keys, values, what cumsum takes, the result


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x @ torch.ones(8, 8),
        lambda x: (
            x.view(2, -1, 2, 4).transpose(1, 2).reshape(2, 2, -1, 4).transpose(1, 2).flatten(2)
        ),
        lambda x: torch.stack(x.chunk(2, -1), 1).mean(1).repeat_interleave(2, -1),
        lambda x: torch.where(x > 0, x, x.softmax(-1)).unsqueeze(0).squeeze(0),
        lambda x: x.expand(2, 6, 8) * x[:, :, :1] + x.amax(-1, keepdim=True),
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2)))).flatten(-2),
        lambda x: x * torch.arange(96.0).view(2, 6, 8).unbind(0)[1],
    ],
    ids=["matmul", "views", "parts", "values", "broadcast", "complex", "table"],
)
def test_operations(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    sharding, met = _run(_Toy(between), (2, 6, 8), 2)
    assert [operation(n) for n in sharding.unknown] in ([], ["repeat_interleave"])
    assert met == 3 + len(sharding.unknown)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", ["keys", "both", "causal"])
def test_masks(kind: str, ranks: int) -> None:
    mask = None
    if kind != "causal":
        mask = torch.rand(1, 1, 1 if kind == "keys" else 12, 12) > 0.3
        mask[..., 0] = True
    sharding, _ = _run(_Masked(mask), (1, 7, 8), ranks)
    assert len(sharding.attention) == (0 if kind == "causal" else 1)
    assert [ATTENTION in operation(n) for n in sharding.unknown] == [True] * (kind == "causal")
