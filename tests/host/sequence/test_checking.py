"""A rule that is wrong about an operation is noticed before any rank computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_sharding import _Toy

from asyncdiff import TokensError
from asyncdiff.graph.capture import capture
from asyncdiff.graph.signature import parse
from asyncdiff.partition.shards import shards
from asyncdiff.sequence import flow, nodes


def _shards(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    module = _Toy(between).eval()
    call = parse(module, (torch.randn(1, 8, 8), torch.tensor(3.0)), {})
    shards(capture(module, call), 2)


def test_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    def between(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.glu(x, 1).repeat(1, 2, 1)

    _shards(between)
    monkeypatch.setitem(flow._RULES, "glu", flow._pointwise)
    _shards(between)  # of tokens of which not all come out nothing is followed
    monkeypatch.setitem(flow._RULES, "glu", flow._first(flow._last))
    with pytest.raises(TokensError, match=r"glu .glu.* makes \[1, 2, 8\] float32"):
        _shards(between)


def test_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def between(x: torch.Tensor) -> torch.Tensor:
        return x.view(torch.int32).to(x.dtype)

    _shards(between)
    monkeypatch.setattr(nodes, "_OTHERS", ())
    with pytest.raises(TokensError, match=r"view .*float32 of it, and .*int32 is the share"):
        _shards(between)


def test_an_error_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def between(x: torch.Tensor) -> torch.Tensor:
        return (x.transpose(1, 2) @ torch.ones(8, 8)).transpose(1, 2)

    _shards(between)
    monkeypatch.setitem(flow._RULES, "matmul", flow._pointwise)
    with pytest.raises(TokensError, match=r"matmul .* does not take a share"):
        _shards(between)
