"""Denoisers that look at values of their conditioning: prepared for these values where that is
possible, else refused by words that say where it happens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from asyncdiff import AsyncDenoiser, CaptureError, InputError
from asyncdiff.graph.capture import capture
from asyncdiff.graph.signature import parse
from asyncdiff.graph.state.values import by_values, not_zero, values_in

_HOME = torch.device("cpu")


class Looking(nn.Module):
    """Chooses by ``question`` about an image what it does, as HunyuanVideo 1.5 does."""

    def __init__(self, question: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.question = question

    def forward(self, sample: torch.Tensor, timestep: Any, image: torch.Tensor) -> Any:
        h = self.first(sample) * timestep
        return (self.second(h + image.mean(1)) if self.question(image) else self.second(h),)


def given(image: float) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 4),
        "timestep": torch.tensor(0.5),
        "image": torch.randn(2, 3, 4) * image,
    }


@pytest.mark.parametrize(
    "question",
    [
        lambda x: not torch.all(x == 0),
        lambda x: not (x.eq(0.0)).all(),
        lambda x: torch.any(x != 0),
        lambda x: x.any(),
    ],
    ids=["all", "eq", "ne", "any"],
)
def test_whether_an_image_is_given(question: Any, capfd: Any) -> None:
    torch.manual_seed(0)
    module = Looking(question).eval()
    denoiser = AsyncDenoiser(module, components=2, warmup=2, split="estimate")
    with torch.no_grad(), contextlib.closing(denoiser):
        for image in (1.0, 0.0, 2.0):
            call = given(image)
            with denoiser.generation([0.5, 0.25]):
                assert torch.equal(denoiser(**call)[0], module(**call)[0])
    assert "def forward" not in capfd.readouterr().err  # what the exporter had of it


@pytest.mark.parametrize(
    "question", [lambda x: x.max() > 0, lambda x: (x == 0).any(), lambda x: (x != 0).all()]
)
def test_other_questions_are_refused_where_they_are_asked(question: Any, capfd: Any) -> None:
    denoiser = AsyncDenoiser(Looking(question).eval(), components=2, split="estimate")
    words = r"data-dependent.*\(in its forward: return \(self"
    with contextlib.closing(denoiser), pytest.raises(CaptureError, match=words):
        denoiser.prepare(**given(1.0))
    assert "def forward" not in capfd.readouterr().err


class Cached(nn.Module):
    """Takes keys out of what it is given, and as many as a mask says."""

    def forward(self, sample: torch.Tensor, timestep: Any, cache: Any, mask: torch.Tensor) -> Any:
        h = sample * timestep + cache["keys"][0, 1] + cache["none"].sum()
        return (h[:, : int(mask.sum())] if self.training or h.max() > 0 else h,)


def test_values_are_passed_as_such_where_inputs_are_checked() -> None:
    module = Cached().eval()
    cache = {"keys": torch.zeros(2, 2, 4), "none": torch.zeros(2, 0)}
    sample, mask = torch.randn(2, 4), torch.tensor([1, 1, 0])
    call = by_values(parse(module, (sample, torch.tensor(0.5), cache, mask), {}), {})
    constants = [values_in(x, _HOME) for _, x in call.signature.constants]
    assert [tuple(x.shape) for x in constants if torch.is_tensor(x)] == [(2, 2, 4), (2, 0), (3,)]
    with pytest.raises(CaptureError, match="data-dependent"):  # and no inputs that do not fit
        capture(module, call)
    wrong = by_values(parse(module, (sample[:, :3], torch.tensor(0.5), cache, mask), {}), {})
    with pytest.raises(InputError, match=r"does not take these inputs .*\(in its forward: h = "):
        capture(module, wrong)


class Sorting(nn.Module):
    """Puts the tokens first that a mask has, which is as floating point numbers as tokens are, and
    behind them as many of its own."""

    def forward(
        self, sample: torch.Tensor, timestep: Any, tokens: torch.Tensor, mask: torch.Tensor
    ) -> Any:
        own = torch.zeros((mask.shape[0], 2), dtype=mask.dtype)
        masks = torch.cat([mask, own], 1).bool()
        tokens = torch.cat([tokens, sample[:, :2] * timestep], 1)
        rows = [torch.cat([x[m], x[~m]]) for x, m in zip(tokens, masks, strict=True)]
        return (torch.stack(rows)[:, : sample.shape[1]] + sample,)


def test_masks_of_floating_point_numbers() -> None:
    module, sample, tokens = Sorting(), torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    denoiser = AsyncDenoiser(module, components=1, warmup=2, split="estimate")
    with torch.no_grad(), contextlib.closing(denoiser):
        for long in (2, 4):
            mask = (torch.arange(5) < torch.tensor([[long], [3]])).float()
            call = {"sample": sample, "timestep": torch.tensor(0.5), "tokens": tokens, "mask": mask}
            with denoiser.generation([0.5, 0.25]):
                assert torch.equal(denoiser(**call)[0], module(**call)[0])


def test_a_signature_says_what_is_not_zero() -> None:
    module = Looking(torch.any)
    some, none = (by_values(parse(module, (), given(x)), {}) for x in (1.0, 0.0))
    assert not_zero(some) == ("image",) and not_zero(none) == ()
    assert some.signature != parse(module, (), given(1.0)).signature
    assert by_values(parse(module, (), given(3.0)), {}).signature == some.signature


def test_a_function_is_no_input() -> None:
    call = parse(Cached(), (torch.ones(2, 4), torch.ones(()), {"mod": test_values}, None), {})
    with pytest.raises(CaptureError, match=r"is given a function \(cache.mod: test_values\)"):
        capture(Cached(), call)


def test_values() -> None:
    masks = [torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=d) for d in (torch.bfloat16, torch.float)]
    for x in (
        *masks,
        torch.zeros(()),
        torch.zeros(2, 0),
        torch.tensor([True, False]),
        torch.arange(4),
    ):
        call = by_values(parse(Looking(torch.any), (), given(1.0) | {"image": x}), {})
        constant = dict(call.signature.constants)["image"]
        assert torch.equal(values_in(constant, _HOME), x)
