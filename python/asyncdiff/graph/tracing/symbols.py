"""Sizes that stay symbols while a denoiser is exported."""

from __future__ import annotations

import builtins
import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..signature import Call, Role, Signature, is_input

#: Inputs by name, and their dimensions whose sizes are to be symbols.
OpenSizes = Mapping[str, tuple[int, ...]]


def structure_of(signature: Signature) -> Any:
    """What calls have in common of which only sizes of the conditioning differ."""
    fixed = tuple(
        (x.name, x.role, x.dtype, len(x.shape) if x.role is Role.CONDITIONING else x.shape)
        for x in signature.inputs
    )
    return fixed, signature.constants, signature.tree


def open_sizes(a: Signature, b: Signature) -> OpenSizes:
    """The sizes that differ between two calls of one structure."""
    found: dict[str, tuple[int, ...]] = {}
    for x, y in zip(a.inputs, b.inputs, strict=True):
        pairs = enumerate(zip(x.shape, y.shape, strict=True))
        found[x.name] = tuple(i for i, (m, n) in pairs if m != n)
    return {name: dims for name, dims in found.items() if dims}


def dynamic_shapes(call: Call, sizes: OpenSizes) -> Any:
    """What torch.export is told of a call's keyword arguments: it finds out by itself how sizes
    depend on each other."""
    auto = torch.export.Dim.AUTO
    leaves = [
        dict.fromkeys(sizes[name], auto) if is_input(leaf) and name in sizes else None
        for name, leaf in zip(call.names, call.leaves, strict=True)
    ]
    return pytree.tree_unflatten(leaves, call.spec)


class _Integers(type):
    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, builtins.int)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.SymInt):
            return args[0]
        return builtins.int(*args, **kwargs)


class _Int(metaclass=_Integers):
    """``int``, to which a symbol is a number as it is."""


def _len(x: Any) -> Any:
    """``len``, for which a tensor may have a symbol of rows."""
    return x.shape[0] if isinstance(x, torch.Tensor) and x.dim() else builtins.len(x)


@contextlib.contextmanager
def symbols_kept(module: nn.Module) -> Iterator[None]:
    """Meanwhile the code of the denoiser's layers has an ``int`` and a ``len`` that leave symbols
    what they are: Python's own make numbers of them."""
    layers = [*module.modules()]
    parts = [*layers, *(getattr(layer, "processor", None) for layer in layers)]
    names = {cls.__module__ for part in parts for cls in type(part).__mro__}
    own = {n for n in names if n.split(".")[0] not in ("torch", "builtins", "asyncdiff")}
    spaces = [vars(sys.modules[n]) for n in own if n in sys.modules]
    changed = [(s, n) for s in spaces for n in ("int", "len") if n not in s]
    try:
        for space, name in changed:
            space[name] = _Int if name == "int" else _len
        yield
    finally:
        for space, name in changed:
            space.pop(name, None)
