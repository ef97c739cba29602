"""What the rules say of each operation: a share of its inputs gives that share of its output."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sequence
import torch
import torchao.quantization.quant_primitives
from torch import fx, nn
from torch.utils import _pytree as pytree

from asyncdiff.sequence import sharding as passes
from asyncdiff.sequence.axis import Axis
from asyncdiff.sequence.flow import _RULES, ANY_SHAPE
from asyncdiff.sequence.nodes import operation
from asyncdiff.sequence.shares import Shares

aten, torchao = torch.ops.aten, torch.ops.torchao
_FP8 = torch.float8_e4m3fn


def _randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return drawn.to(dtype) if dtype.is_floating_point else (8 * drawn).to(dtype)


#: An operation, its arguments, and along which dimensions of its first input tokens are followed.
_Case = tuple[Any, tuple[Any, ...], dict[str, Any], str]
_X, _SQUARE, _MATRIX = _randn(2, 6, 8), _randn(2, 6, 6), _randn(6, 6)
_BYTES, _META = _randn(6, 8, dtype=torch.int8), _randn(6, 8).to("meta", torch.bfloat16)
_NARROW, _WIDE = _randn(6, 16).to(_FP8), _randn(32, 16).to(_FP8).t()
_OUT = {"out_dtype": torch.bfloat16}


def _reductions() -> Iterator[_Case]:
    for name in ("mean", "sum", "prod", "var", "std"):
        yield getattr(aten, name).default, (_X,), {}, ""
    for name in ("mean.dim", "sum.dim_IntList", "amax.default", "amin.default", "var.dim"):
        operation = getattr(getattr(aten, name.split(".")[0]), name.split(".")[1])
        yield operation, (_X, [1]), {}, "02"
        yield operation, (_X, [-1], True), {}, "01"
        yield operation, (_X, []), {}, ""
    for reduced in (aten.var, aten.std):
        yield reduced.default, (_X, False), {}, ""
        yield reduced.dim, (_X, [1], True), {}, "02"
        yield reduced.dim, (_X, [0, 2], False, True), {}, "1"
        yield reduced.correction, (_X,), {}, ""
        yield reduced.correction, (_X, [1]), {"correction": 0}, "02"
        yield reduced.correction, (_X, [1]), {"keepdim": True}, "02"
    yield aten.prod.dim_int, (_X, 1), {}, "02"
    yield aten.prod.dim_int, (_X, -1, True), {}, "01"


def _others() -> Iterator[_Case]:
    for view in (aten.view, aten.reshape, aten._unsafe_view):
        yield view.default, (_X, [2, 6, 4, 2]), {}, "01"
    yield aten.view.dtype, (_X, torch.int32), {}, "012"
    yield aten.view.dtype, (_X.to(_FP8), torch.uint8), {}, "012"
    yield aten.view.dtype, (_X, torch.int16), {}, ""
    yield aten.view_as.default, (_X, _X + 1), {}, "012"
    yield aten.view_as.default, (_randn(6, 36), _randn(6, 6, 6)), {}, ""
    yield aten.flatten.using_ints, (_randn(2, 6, 2, 4), 2), {}, "01"
    yield aten.flatten.using_ints, (_randn(2, 6, 1, 8), 1, 2), {}, "013"
    yield aten.unflatten.int, (_X, 1, [6, 1]), {}, "012"
    yield aten.unflatten.int, (_X, 1, [2, -1]), {}, "02"
    yield aten.unflatten.int, (_X, -1, [2, 4]), {}, "01"
    for softmax in (aten.softmax.int, aten.log_softmax.int):
        yield softmax, (_X, -1), {}, "01"
    yield aten._softmax.default, (_X, 1, False), {}, "02"
    yield aten.glu.default, (_X,), {}, "01"
    yield aten.glu.default, (_X, 1), {}, "02"
    yield aten.split.Tensor, (_X, 4, 1), {}, "02"
    for split in (aten.split.sizes, aten.split.default, aten.split_with_sizes.default):
        yield split, (_X, [2, 6], -1), {}, "01"
    yield aten.chunk.default, (_X, 2), {}, "12"
    yield aten.layer_norm.default, (_X, [8], _randn(8)), {}, "01"
    yield aten.layer_norm.default, (_X, [6, 8]), {}, "0"
    yield aten.rms_norm.default, (_X, [8]), {}, "01"
    yield aten.linear.default, (_X, _randn(4, 8), _randn(4)), {}, "01"
    yield aten.view_as_complex.default, (_randn(2, 6, 4, 2),), {}, "012"
    yield aten.view_as_real.default, (torch.complex(_X, _X),), {}, "012"
    yield aten.permute.default, (_X, [2, 0, -2]), {}, "012"
    yield aten.transpose.int, (_X, 1, -1), {}, "012"
    yield aten.unsqueeze.default, (_X, -2), {}, "012"
    yield aten.squeeze.default, (_randn(1, 6, 1, 8),), {}, "13"
    yield aten.squeeze.dim, (_randn(1, 6, 8), 1), {}, "12"
    yield aten.squeeze.dims, (_randn(1, 6, 1, 8), [0, 1]), {}, "13"
    yield aten.expand.default, (_randn(1, 6, 1), [2, -1, 8]), {}, "1"
    yield aten.expand_as.default, (_randn(6, 1), _X), {}, "0"
    yield aten.type_as.default, (_X, _randn(6, 2, dtype=torch.float64)), {}, "012"
    yield aten.to.other, (_randn(6, 2), _randn(2, 6, 6, dtype=torch.float64)), {}, "01"
    yield aten.stack.default, ([_X, _X + 1], 1), {}, "012"
    yield aten.unbind.int, (_X, -1), {}, "01"
    yield aten.select.int, (_X, 1, 2), {}, "02"
    yield aten.slice.Tensor, (_X, 2, 1, 4), {}, "01"
    yield aten.slice.Tensor, (_X, 1, 0, 6, 2), {}, "02"
    yield aten.slice_scatter.default, (_X, _randn(2, 2, 8), 1, 1, 3), {}, "02"
    yield aten.cat.default, ([_X, _randn(2, 6, 3)], -1), {}, "012"
    yield aten.cat.default, ([_X, _X], 1), {}, "012"
    yield aten.cat.default, ([_X, _randn(0)], 1), {}, ""
    yield aten.matmul.default, (_X, _randn(2, 8, 6)), {}, "01"
    yield aten.matmul.default, (_randn(6, 8), _randn(2, 8, 6)), {}, "0"
    yield aten.matmul.default, (_SQUARE, _SQUARE), {}, "0"
    yield aten.matmul.default, (_X, _randn(8)), {}, ""
    yield aten.bmm.default, (_SQUARE, _SQUARE), {}, "0"
    yield aten.bmm.default, (_X, _randn(2, 8, 4)), {}, "01"
    yield aten.mm.default, (_MATRIX, _MATRIX), {}, ""
    yield aten.mm.default, (_MATRIX, _MATRIX + 1), {}, "0"
    yield aten._int_mm.default, (_BYTES, _BYTES.t().contiguous()), {}, "0"
    yield aten.addmm.default, (_randn(4), _randn(6, 8), _randn(8, 4)), {}, "0"
    for twice in ((_MATRIX, _MATRIX, _randn(6, 6) + 1), (_MATRIX, _MATRIX + 1, _MATRIX)):
        yield aten.addmm.default, twice, {}, ""
    yield aten.bmm.dtype, (_META[None], _META.t()[None], torch.float32), {}, "1"
    yield aten.mm.dtype, (_META, _META.t(), torch.float32), {}, "0"
    yield aten.addmm.dtype, (_META[:, :6], _META, _META.t(), torch.float32), {}, "01"
    rows, columns, one = _randn(6, 1).abs(), _randn(1, 32).abs(), torch.tensor(0.5)
    for scales in ((rows, columns), (one, one)):
        yield aten._scaled_mm.default, (_NARROW, _WIDE, *scales), _OUT, "0"
    yield torchao.choose_qparams_affine.default, (_X, "SYMMETRIC", [1, 1, 4], torch.int8), {}, "01"
    yield torchao.choose_scale_float8.default, (_X, [1, 1, 8]), {}, "01"
    scale = _randn(2, 6, 2).abs() + 1
    of = ([1, 1, 4], scale, torch.zeros_like(scale))
    yield torchao.quantize_affine.default, (_X, *of, torch.int8), {}, "01"
    codes = _randn(2, 6, 8, dtype=torch.int8)
    yield torchao.dequantize_affine.default, (codes, *of, torch.int8), {}, "01"
    by_row = scale[..., :1]
    yield torchao.quantize_affine_float8_non_decomposed.default, (_X, by_row), {}, "012"
    yield torchao.dequantize_affine_float8_non_decomposed.default, (_X.to(_FP8), by_row), {}, "012"
    yield operator.getitem, (_X, 1), {}, "12"
    yield aten.where.default, (_X > 0,), {}, ""
    yield aten.masked_fill.Tensor, (_X, _X > 0, torch.tensor(1.0)), {}, "012"


def _overloads(name: str) -> list[Any]:
    """Those of an operation by which tensors become tensors, in an exported graph."""
    packet = getattr(aten, name, None)
    each = [] if packet is None else [getattr(packet, o) for o in packet.overloads()]
    found = []
    for overload in each:
        said = str(overload._schema)
        to_tensors = "Tensor" in said.split("->")[0] and "Tensor" in said.rpartition("->")[2]
        of_names = any(word in said for word in ("Dimname", "Dict(", "aten::to.prim_"))
        if to_tensors and not of_names and not any(a.is_out for a in overload._schema.arguments):
            found.append(overload)
    return found


_BITS = ("bitwise_not", "bitwise_and", "bitwise_or", "__and__", "__or__")
#: What an argument is, by its type.
_GIVEN = {"bool": False, "int": 1, "float": 0.5, "ScalarType": torch.float64, "Device": "cpu"}


def _by_schema(overload: Any) -> _Case:
    """A case of an operation on each element: the last of several tensors is broadcast."""
    name, arguments = overload.__name__.split(".")[0], overload._schema.arguments
    tensors = [a.name for a in arguments if "Tensor" in str(a.type)]
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for a in arguments:
        kind = str(a.type).removeprefix("Optional[").removesuffix("]")
        if a.name in tensors:
            last = len(tensors) > 1 and a.name == tensors[-1]
            value: Any = _X.abs() + len(args) if not last else _randn(6, 1).abs()
            value = value > 1 if a.name in ("condition", "mask") else value
            value = value.int() if name in _BITS else value
        elif a.has_default_value() and kind not in ("Scalar", "number"):
            continue
        else:
            value = {**_GIVEN, "number": 2, "Scalar": 2}.get(kind, a.default_value)
        if a.kwarg_only:
            kwargs[a.name] = value
        else:
            args.append(value)
    return overload, tuple(args), kwargs, "012"


_CASES = [*_reductions(), *_others()]
_HAND = {case[0] for case in _CASES}
_CASES += [_by_schema(o) for name in ANY_SHAPE for o in _overloads(name) if o not in _HAND]


def _node(case: _Case) -> tuple[fx.Node, list[fx.Node], list[torch.Tensor]]:
    """The operation in a graph, what it takes, and what that is."""
    target, args, kwargs, _ = case
    graph = fx.Graph()
    values: dict[int, tuple[fx.Node, torch.Tensor]] = {}

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in values:
            made = graph.placeholder(f"x{len(values)}")
            made.meta["val"] = value
            values[id(value)] = made, value
        return values[id(value)][0]

    node = graph.call_function(target, *pytree.tree_map(place, (args, kwargs)))
    node.meta["val"] = target(*args, **kwargs)
    return node, *map(list, zip(*values.values(), strict=True))  # type: ignore[return-value]


def _followed(node: fx.Node, source: fx.Node, dim: int, values: list[torch.Tensor]) -> bool:
    """Whether tokens along ``dim`` of an input are followed; if so ranks give what it gives."""
    length = source.meta["val"].shape[dim]
    found = passes.Sharding({source: Axis(dim, (length,))}, {source})
    graph, outputs = node.graph, [node]
    passes._visit(node, found)
    if isinstance(node.meta["val"], (list, tuple)):
        outputs = [graph.call_function(operator.getitem, (node, i)) for i in range(2)]
        for i, each in enumerate(outputs):
            each.meta["val"] = node.meta["val"][i]
            passes._visit(each, found)
    if node in found.unknown:
        return False
    graph.output(tuple(outputs))
    captured: Any = SimpleNamespace(
        graph=graph, root=nn.Module(), outputs=outputs, views=set(), inputs={}, timed=(), once=()
    )
    for outcome in sequence.run(captured, found, Shares(4), values)[0]:  # of one token, and of two
        for each, value in zip(outputs, outcome, strict=True):
            wanted = each.meta["val"]
            assert value.shape == wanted.shape and value.dtype == wanted.dtype
            if value.device.type != "meta" and "empty" not in str(node.target):
                narrow = value.dtype is _FP8  # torch compares no such numbers
                got, want = (v.float() if narrow else v for v in (value, wanted))
                torch.testing.assert_close(got, want, equal_nan=True)
    return True


@pytest.mark.parametrize("case", _CASES, ids=lambda c: str(c[0]).removeprefix("aten."))
def test_ranks_compute_their_shares(case: _Case) -> None:
    _, sources, values = _node(case)
    shape = values[0].shape
    dims = [d for d in range(len(shape)) if shape[d] > 1]
    followed = "".join(str(d) for d in dims if _followed(*_again(case, 0), d, values))
    assert followed == case[3]
    for index in range(1, len(sources)):
        for d, size in enumerate(values[index].shape):
            if size > 1:
                _followed(*_again(case, index), d, values)


def _again(case: _Case, index: int) -> tuple[fx.Node, fx.Node]:
    node, sources, _ = _node(case)
    return node, sources[index]


def test_every_rule_has_its_cases() -> None:
    tried = {case[0] for case in _CASES}
    names = {operation(_node(case)[0]) for case in _CASES if case[3]}
    assert names >= set(_RULES)
    for name in {rule.split(".")[0] for rule in _RULES}:
        missing = [str(o) for o in _overloads(name) if o not in tried]
        assert not missing, f"no case of {missing}"


def test_of_other_libraries_names_say_nothing() -> None:
    with torch.library._scoped_library("asyncdiff_test", "DEF") as library:
        library.define("add(Tensor a, Tensor b) -> Tensor")
        library.impl("add", lambda a, b: a + b.flip(1), "CompositeExplicitAutograd")
        case = torch.ops.asyncdiff_test.add.default, (_X, _X + 1), {}, ""
        test_ranks_compute_their_shares(case)
        assert operation(_node(case)[0]) == "asyncdiff_test.add"
