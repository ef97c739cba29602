"""Addresses of arrays: by DLPack's exchange table where there is one, else by a closer look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from core_bundles import receive

import asyncdiff_core as core
from asyncdiff.runtime.exchange.buffers import layout_of

has_table = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="this torch has no DLPack exchange table",
)


def channel_for(tensors: list[torch.Tensor]) -> tuple[core.HostFabric, core.Channel]:
    fabric = core.HostFabric(2, deadline=2)
    return fabric, fabric.channel(0, [1], layout_of(tensors), slots=2)


TYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool,
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
    looked_at = [a.pointer for a in channel._looked_at(many)]
    assert channel._native.addresses(many, False) == looked_at
    assert channel._native.addresses(tuple(many), False) == looked_at
    if dtype.is_floating_point:
        weights = [torch.nn.Parameter(x) for x in many]  # of another type, and with a gradient
        assert [a.pointer for a in channel._looked_at(weights)] == looked_at
        assert channel._native.addresses(weights, False) in (None, looked_at)


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
        with pytest.raises(core.InvalidArgument, match="was agreed"):
            channel.push(0, other, 0)
    for index in (-1, 1):
        with pytest.raises(core.InvalidArgument, match=f"tensor {index}: the bundle .* 1 tensors"):
            channel.push(index, x, 0)
    assert found([x, x], False) is None and found([], False) is None and found(x, False) is None
    assert found([None], False) is None and found([x.numpy()], False) is None
    # A dimension of one may have any stride.
    _, one = channel_for([torch.zeros(1, 6)])
    odd = torch.zeros(1, 12)[:, :6]
    assert odd.stride() != (6, 1)
    assert one._native.addresses([odd], False) == [odd.data_ptr()]


def test_complex_tensors_that_are_conjugated_lazily_are_refused() -> None:
    x = torch.tensor([[1 + 2j, 3 - 4j]])
    _, channel = channel_for([x])
    assert channel._native.addresses([x], False) is None  # the closer look knows
    with pytest.raises(core.InvalidArgument, match=r"lazily .* tensor\.resolve_conj\(\)"):
        channel.put([x.conj()], 0)
    with pytest.raises(core.InvalidArgument, match="lazily"):
        channel.push(0, x.conj(), 0)
    for slot, whole in enumerate([x, x.conj().resolve_conj()]):
        channel.put([whole], slot)
        assert np.array_equal(receive(channel, 1, slot)[0], whole.numpy())


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as quantized and distributed ones are."""

    @staticmethod
    def __new__(cls) -> Wrapper:
        make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        return make(cls, (4,), dtype=torch.float32)  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:  # type: ignore[override]
        raise NotImplementedError


def freed() -> torch.Tensor:
    x = torch.zeros(4)
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("make", [Wrapper, freed, lambda: torch.zeros(4).to_sparse()])
def test_tensors_without_memory_are_refused(make: Callable[[], torch.Tensor]) -> None:
    fabric, channel = channel_for([torch.zeros(4)])
    with pytest.raises(core.InvalidArgument, match="no memory"):
        channel.put([make()], 0)
    with pytest.raises(core.InvalidArgument, match="no memory"):
        fabric.put_batch([(channel, [make()], 0)])
    channel.begin(0)
    with pytest.raises(core.InvalidArgument, match="no memory"):
        channel.push(0, make(), 0)
    with pytest.raises(core.InvalidArgument, match="no memory"):
        channel.push_pointer(0, 0, 0)
    channel.push(0, torch.ones(4), 0)
    channel.commit(0)
    assert receive(channel, 1, 0)[0].tolist() == [1, 1, 1, 1]


def test_tensors_pushed_one_by_one_are_of_any_library() -> None:
    x = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).T
    pushed = [x, np.arange(5.0), torch.empty(0, 3), np.float32(7), torch.ones(1, 3)[:, ::3]]
    _, channel = channel_for([torch.as_tensor(p) for p in pushed])
    channel.begin(0)
    for i, tensor in enumerate(pushed):
        channel.push(i, np.asarray(tensor) if i == 3 else tensor, 0)
    channel.commit(0)
    channel.get(1, 0)
    raw = torch.as_tensor(np.asarray(channel.slot(1, 0)))
    for sent, spec, at in zip(pushed, channel.layout.specs, channel.layout.offsets, strict=True):
        got = raw[at : at + spec.nbytes].view(getattr(torch, spec.dtype))
        assert torch.equal(got.as_strided(spec.shape, spec.strides), torch.as_tensor(sent))


def test_bundles_of_several_libraries() -> None:
    x, y = torch.arange(6.0).reshape(2, 3), np.arange(6, dtype=np.float32).reshape(2, 3) + 10
    fabric, channel = channel_for([x, torch.from_numpy(y)])
    for slot, pair in enumerate([(x, y), (y, x)]):
        channel.put(pair, slot)
        for sent, got in zip(pair, receive(channel, 1, slot), strict=True):
            assert np.array_equal(np.asarray(sent), got)
    fabric.close()


class Interface:
    """An array with this as the data of its interface."""

    def __init__(self, data: Any) -> None:
        self.__array_interface__ = {"shape": (4,), "typestr": "|u1", "version": 3} | data


@pytest.mark.parametrize(
    "data",
    [{"data": b"abcd"}, {"data": None}, {}, {"data": (b"abcd", False)}, {"data": (1, 2, 3)}],
    ids=str,
)
def test_interfaces_without_an_address_are_refused(data: dict[str, Any]) -> None:
    _, channel = channel_for([torch.zeros(4, dtype=torch.uint8)])
    with pytest.raises(core.InvalidArgument, match=r"no address.*numpy\.asarray"):
        channel.put([Interface(data)], 0)
    with pytest.raises(core.InvalidArgument, match="no address"):
        channel.push(0, Interface(data), 0)


def test_pictures_are_refused() -> None:
    image = pytest.importorskip("PIL.Image").new("L", (4, 4))
    _, channel = channel_for([torch.zeros(4, 4, dtype=torch.uint8)])
    with pytest.raises(core.InvalidArgument, match="interface of Image gives no address"):
        channel.put([image], 0)
    channel.put([np.asarray(image)], 0)
