"""Element types, dense strides, offsets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import asyncdiff_core as core


def test_row_major_by_default() -> None:
    spec = core.TensorSpec("bfloat16", (2, 3, 4))
    assert spec.strides == (12, 4, 1)
    assert spec.nbytes == 48


def test_scalars_and_empty_tensors() -> None:
    assert core.TensorSpec("float64", ()).nbytes == 8
    assert core.TensorSpec("float64", (3, 0, 2)).nbytes == 0
    assert core.TensorSpec("float64", (3, 0), (7, 7)).nbytes == 0


@given(st.permutations(range(4)), st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_any_order_of_dimensions_is_dense(order: list[int], shape: list[int]) -> None:
    tensor = torch.empty(shape).permute(*order)
    spec = core.TensorSpec("float32", tensor.shape, tensor.stride())
    assert spec.nbytes == tensor.numel() * 4
    assert spec.same_strides(tensor.stride())


@pytest.mark.parametrize(
    ("dtype", "shape", "strides", "message"),
    [
        ("float33", (1,), None, "no element type"),
        ("float32", (-1,), None, "negative size"),
        ("float32", (1 << 40, 1 << 40), None, "too large"),
        ("float32", (4, 4), (8, 1), "gaps or overlap"),
        ("float32", (4, 4), (0, 1), "gaps or overlap"),
        ("float32", (4, 4), (1,), "differ in length"),
    ],
)
def test_refused(dtype: str, shape: tuple[int], strides: tuple[int] | None, message: str) -> None:
    with pytest.raises(core.InvalidArgument, match=message) as caught:
        core.TensorSpec(dtype, shape, strides)
    assert isinstance(caught.value, ValueError)


def test_strides_of_another_length_are_others() -> None:
    for strides in ([], [1], [4, 1, 1]):
        assert not core.TensorSpec("uint8", (4, 4)).same_strides(strides)
        assert not core.TensorSpec("uint8", (0, 4)).same_strides(strides)


def test_sizes_do_not_wrap() -> None:
    huge = core.TensorSpec("uint8", (2**62,))
    assert core.Layout([huge]).nbytes == 2**62
    for count in (2, 4):
        with pytest.raises(core.InvalidArgument, match=rf"{count} tensors is too large"):
            core.Layout([huge] * count)
    fabric = core.HostFabric(9)
    for nbytes, slots, receivers in [(2**62, 4, 1), (2**59, 2, 8), (2**62, 1, 1)]:
        layout = core.Layout([core.TensorSpec("uint8", (nbytes,))])
        with pytest.raises(core.InvalidArgument, match="'big' is too large to address"):
            fabric.channel(0, range(1, 1 + receivers), layout, slots=slots, name="big")
    assert core.TensorSpec("uint8", (0, 2**62, 4)).strides == (2**63 - 1, 4, 1)


def test_offsets_are_aligned() -> None:
    sizes = (1, 0, 256, 257)
    layout = core.Layout([core.TensorSpec("uint8", (n,)) for n in sizes])
    assert layout.offsets == (0, 256, 256, 512)
    assert layout.nbytes == 1024
    assert core.Layout([]).nbytes == 0


def test_every_torch_type_of_a_hidden_state_is_known() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.bool):
        name = str(dtype).removeprefix("torch.")
        assert core.TensorSpec(name, (3,)).nbytes == 3 * dtype.itemsize
