"""Which inputs hold both conditions: found out exactly, or the denoiser is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_sd3
from toys import toy, toy_call

from asyncdiff import InputError
from asyncdiff.graph import conditions
from asyncdiff.graph.batch import BatchSplit
from asyncdiff.graph.conditions import batched_inputs
from asyncdiff.graph.signature import parse

Function = Callable[..., torch.Tensor]


class Made(torch.nn.Module):
    """A denoiser that is one function of latents, timestep and one more argument."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.layer = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Any, timestep: Any, more: Any) -> tuple[torch.Tensor]:
        return (self.function(self.layer(sample), timestep, more),)


def found(function: Function, more: torch.Tensor, batch: int = 2) -> bool:
    """Whether the further argument is found to hold both conditions."""
    torch.manual_seed(0)
    module = Made(function).double().eval().requires_grad_(False)
    sample = torch.randn(batch, 4, 8, 8).double()
    call = parse(module, (), {"sample": sample, "timestep": torch.tensor(500), "more": more})
    batched = batched_inputs(module, call, BatchSplit(1, 2))
    assert batched[:2] == [True, False]
    return batched[2]


@pytest.mark.parametrize(
    ("function", "more"),
    [
        (lambda x, t, size: x * (size[0] / size[1]), torch.tensor([64, 96])),
        (lambda x, t, size: x * size.double().mean(), torch.tensor([64, 64])),
        (lambda x, t, size: x + size.double().log().sum(), torch.tensor([64.0, 96.0])),
        (lambda x, t, size: x + (size.double() @ torch.ones(2).double()), torch.tensor([0.0, 0])),
        (lambda x, t, flags: torch.where(flags.all(), x, -x), torch.tensor([True, True])),
        (lambda x, t, more: x + more[1:, :1, None, None].double(), torch.randn(2, 5)),
        (lambda x, t, table: x + table[t // 500].double().sum(), torch.arange(6).reshape(2, 3)),
    ],
)
def test_what_is_shared(function: Function, more: torch.Tensor) -> None:
    assert not found(function, more)


@pytest.mark.parametrize(
    ("function", "more"),
    [
        (lambda x, t, text: x + text.mean(1)[:, None, None, None], torch.randn(2, 5).double()),
        (lambda x, t, scale: x * scale.reshape(-1, 1, 1, 1), torch.tensor([7.5, 7.5]).double()),
        (lambda x, t, label: x + torch.eye(9)[label].sum(1).reshape(-1, 1, 1, 1)
         * label.reshape(-1, 1, 1, 1), torch.tensor([0, 8])),
        (lambda x, t, mask: torch.where(mask.reshape(-1, 1, 1, 1), x, 0.0),
         torch.tensor([True, True])),
        (lambda x, t, unused: x, torch.randn(2, 3)),
    ],
)  # fmt: skip
def test_what_is_of_each_sample(function: Function, more: torch.Tensor) -> None:
    assert found(function, more)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t, more: x - x.mean(0),
        lambda x, t, more: x - 1e-9 * x.mean(0),  # less than any tolerance
        lambda x, t, more: x + more.roll(1, 0).sum(1).reshape(-1, 1, 1, 1) * x.flip(0),
        lambda x, t, more: torch.cat([x[:1], x[1:] + 1e-9 * x[:1]]),  # one way only
    ],
)
def test_conditions_that_know_of_each_other_are_refused(function: Function) -> None:
    with pytest.raises(InputError, match="mixes the conditions of the batch"):
        found(function, torch.randn(2, 5).double())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, t, more: x / len(x), "gives other results for one condition"),
        (lambda x, t, more: torch.cat([x[:1], 2 * x[1:]]), "gives other results for one"),
        (lambda x, t, more: x.unflatten(0, (2, -1)).flatten(0, 1), "cannot be run on one"),
        (lambda x, t, more: x.mean(), "not there for each sample"),
    ],
)
def test_one_condition_alone_is_another_matter(function: Function, message: str) -> None:
    with pytest.raises(InputError, match=message):
        found(function, torch.randn(2, 5).double())


def test_processors_that_are_known_to_mix_are_refused() -> None:
    module = toy()
    call = parse(module, (), toy_call())
    assert batched_inputs(module, call, BatchSplit(1, 2)) == [True, False, True]

    class PAGCFGProcessor:
        pass

    module.mix.processor = PAGCFGProcessor()
    with pytest.raises(InputError, match="PAGCFGProcessor mixes the parts of the batch"):
        batched_inputs(module, call, BatchSplit(1, 2))


def test_conditioning_of_each_frame() -> None:
    class Video(torch.nn.Module):
        def forward(self, sample: Any, timestep: Any, text: Any, rope: Any) -> Any:
            text = text.mean((1, 2)).unflatten(0, (2, 3))[:, None, :, None, None]
            return sample + text[: len(sample)] * rope.sum()

    class Real(Video):
        def forward(self, sample: Any, timestep: Any, text: Any, rope: Any) -> Any:
            text = text.mean((1, 2)).unflatten(0, (-1, 3))[:, None, :, None, None]
            return sample + text * rope.sum()

    tensors = {
        "sample": torch.randn(2, 4, 3, 8, 8),  # three frames
        "timestep": torch.tensor(1),
        "text": torch.randn(6, 7, 5),  # once a frame
        "rope": torch.randn(12, 5),  # nothing to do with the batch
    }
    assert batched_inputs(Real(), parse(Real(), (), tensors), BatchSplit(1, 2)) == [
        True,
        False,
        True,
        False,
    ]
    with pytest.raises(InputError, match="cannot be run on one condition"):
        batched_inputs(Video(), parse(Video(), (), tensors), BatchSplit(1, 2))


def test_a_denoiser_that_is_never_quite_the_same() -> None:
    """Whose kernels add up in any order: no more than that counts as a difference."""
    generator = torch.Generator().manual_seed(0)

    def noisy(x: torch.Tensor, t: Any, more: torch.Tensor) -> torch.Tensor:
        return x * (1 + 1e-12 * torch.rand(x.shape, generator=generator).double())

    assert found(noisy, torch.randn(2, 5).double())
    with pytest.raises(InputError, match="mixes"):
        found(lambda x, t, more: noisy(x, t, more) - 1e-6 * x.flip(0), torch.randn(2, 5).double())


def test_nothing_of_it_stays() -> None:
    """Neither the user's random numbers nor what layers count are touched."""
    calls: list[int] = []

    def random(x: torch.Tensor, t: Any, more: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x + 0 * torch.rand(x.shape)

    torch.manual_seed(3)
    want = torch.rand(3)
    module = Made(random).double()
    call = {"sample": torch.randn(2, 4, 8, 8).double(), "timestep": torch.tensor(5)}
    parsed = parse(module, (), {**call, "more": torch.randn(2, 5).double()})
    torch.manual_seed(3)
    batched_inputs(module, parsed, BatchSplit(1, 2))
    assert torch.equal(torch.rand(3), want) and not calls


def test_weights_that_wait_on_the_host() -> None:
    """They are brought to the latents' device where an operation needs them: shown on meta."""
    pipe, _ = tiny_sd3()
    module = pipe.transformer
    config = module.config
    meta = {"device": "meta"}
    call = {
        "hidden_states": torch.empty(2, config.in_channels, 16, 16, **meta),
        "timestep": torch.empty(2, **meta),
        "encoder_hidden_states": torch.empty(2, 7, config.joint_attention_dim, **meta),
        "pooled_projections": torch.empty(2, config.pooled_projection_dim, **meta),
    }
    with torch.no_grad(), pytest.raises(RuntimeError):
        module(**call)
    with torch.no_grad(), conditions._Together(torch.device("meta")):
        out = module(**call, return_dict=False)[0]
    assert out.device.type == "meta" and out.shape == call["hidden_states"].shape
