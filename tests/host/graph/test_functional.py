"""Graphs without writes: the same values as those of the module that wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from asyncdiff.graph.layers.functional import replace_writes, writes


class Of(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("count", torch.ones(8))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x, self.count)


def rotary(x: torch.Tensor, count: torch.Tensor) -> Any:
    out = torch.empty_like(x)
    out[..., 0::2] = x[..., 1::2]
    out[..., 1::2] = -x[..., 0::2]
    return out, out.type_as(x)


def views_from_before(x: torch.Tensor, count: torch.Tensor) -> Any:
    """They show what is written later; what was computed of them does not."""
    out = x * 1
    whole, before, flat = out.transpose(0, 1), out * 2, out.view(-1)
    first, *_ = out.unbind(0)
    last = out.chunk(2, 1)[1]
    out[0].add_(1.0)
    between = whole.sum(0)
    out.mul_(2)
    return whole, before, flat, first, last, between, out


def views_of_views(x: torch.Tensor, count: torch.Tensor) -> Any:
    out = x.clone()
    row = out[1]
    row[2:4].fill_(7)
    row[0].diagonal().zero_()
    again = row.add_(1)
    again[:, 1:].copy_(x[0, :, 1:])
    return out, row, again


def other_dtypes(x: torch.Tensor, count: torch.Tensor) -> Any:
    whole = torch.zeros(x.shape[1:], dtype=torch.int64)
    whole[1] = x[0, 0, 0]
    whole[2] = 3
    half = torch.zeros(8, dtype=torch.float16).add_(count * 0.1)
    return whole, half, torch.zeros(8).add_(1).mul_(count).clamp_(max=0.5)


def of_another_written_later(x: torch.Tensor, count: torch.Tensor) -> Any:
    """What was copied stays what it was."""
    source, out = x * 2, torch.zeros_like(x)
    out.copy_(source)
    source.add_(1)
    out[0] = source[1]
    source.zero_()
    return out, source


@pytest.mark.parametrize(
    "function", [rotary, views_from_before, views_of_views, other_dtypes, of_another_written_later]
)
def test_the_same_values(function: Callable[..., Any]) -> None:
    module, x = Of(function), torch.randn(4, 6, 8, 8)
    program = torch.export.export(module, (x,), strict=False)
    assert any(map(writes, program.graph.nodes))
    assert replace_writes(program.graph)
    assert not any(map(writes, program.graph.nodes))
    program.graph.lint()
    program.graph_module.recompile()
    for got, want in zip(program.module()(x), module(x), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, count: x.add_(1) * 2,  # an input
        lambda x, count: x * count.add_(1),  # a buffer
        lambda x, count: torch.zeros_like(x).normal_() + x,
        lambda x, count: torch.zeros_like(x).transpose(0, 1).copy_(x.transpose(0, 1)) * 1,
    ],
    ids=["input", "buffer", "random", "a view that is not put back"],
)
def test_what_cannot_be_replaced_stays(function: Callable[..., Any]) -> None:
    program = torch.export.export(Of(function), (torch.randn(2, 3, 8),), strict=False)
    before = [node.format_node() for node in program.graph.nodes]
    assert not replace_writes(program.graph)
    assert [node.format_node() for node in program.graph.nodes] == before
