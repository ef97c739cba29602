"""Addresses of arrays: by DLPack's exchange table where there is one, else by a closer look."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import asyncdiff_core as core
from asyncdiff.bundle import layout_of

has_table = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="this torch has no DLPack exchange table",
)


def channel_for(tensors: list[torch.Tensor]) -> tuple[core.HostFabric, core.Channel]:
    fabric = core.HostFabric(2, deadline=2)
    return fabric, fabric.channel(0, [1], layout_of(tensors), slots=2)


TYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.bool,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
]  # fmt: skip


@has_table
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_the_table_finds_what_the_closer_look_finds(dtype: torch.dtype) -> None:
    base = torch.zeros(4, 6, 2, dtype=dtype)
    many = [
        base[1:],
        base.permute(2, 0, 1),
        base[0, 0, 0],
        base[:0],
        torch.zeros(1, 3, dtype=dtype),
    ]
    _, channel = channel_for(many)
    assert channel._native.addresses(many, False) == channel._looked_at(many)
    assert channel._native.addresses(tuple(many), False) == channel._looked_at(many)
    if dtype.is_floating_point:
        weights = [torch.nn.Parameter(x) for x in many]  # of another type, and with a gradient
        assert channel._looked_at(weights) == channel._looked_at(many)
        found = channel._native.addresses(weights, False)
        assert found is None or found == channel._looked_at(weights)


@has_table
def test_what_is_unlike_the_layout_is_left_to_the_closer_look() -> None:
    x = torch.zeros(4, 6)
    _, channel = channel_for([x])
    found = channel._native.addresses
    assert found([x], False) is not None
    assert found([x], True) is None  # not on a GPU
    for other in (x.half(), x.int(), x[:3], x[None], x.T, x.T.contiguous().T, torch.zeros(6, 4)):
        assert found([other], False) is None, other
        with pytest.raises(core.InvalidArgument, match="was agreed"):
            channel.put([other], 0)
    assert found([x, x], False) is None and found([], False) is None and found(x, False) is None
    assert found([None], False) is None and found([x.numpy()], False) is None
    # A dimension of one may have any stride.
    _, one = channel_for([torch.zeros(1, 6)])
    odd = torch.zeros(1, 12)[:, :6]
    assert odd.stride() != (6, 1)
    assert one._native.addresses([odd], False) == [odd.data_ptr()]


def test_bundles_of_several_libraries() -> None:
    x, y = torch.arange(6.0).reshape(2, 3), np.arange(6, dtype=np.float32).reshape(2, 3) + 10
    fabric, channel = channel_for([x, torch.from_numpy(y)])
    for slot, pair in enumerate([(x, y), (y, x)]):
        channel.put(pair, slot)
        out = [np.zeros((2, 3), np.float32), torch.zeros(2, 3)]
        channel.unpack(1, out, slot)
        for sent, got in zip(pair, out, strict=True):
            assert np.array_equal(np.asarray(sent), np.asarray(got))
    fabric.close()
