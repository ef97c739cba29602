"""A look at what nodes make of shares of tokens, before any is computed.

Rules tell through which operations tokens can be followed. Where one is wrong about a node, a rank
would compute something else than its share of the value, or end in an error of torch. What shows
in sizes and dtypes is found out here.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..errors import TokensError
from ..graph.program import rehome
from .axis import Axis
from .flow import ANY_SHAPE
from .nodes import operation
from .sharding import ATTENTION, Form, Keys, Mask
from .shares import Shares

#: What else can be done with a denoiser whose tokens cannot be shared out.
HINT = "take schedule='asyncdiff' or 'wavefront', or exact_mode='chain', for this denoiser"
#: What takes each token, or each query, by itself, with arguments that say nothing of sizes: not
#: looked at, as torch takes long to say what sizes it makes.
_SIMPLE = frozenset((*ANY_SHAPE, "linear", "layer_norm", "rms_norm", "stack", ATTENTION))
_META = torch.device("meta")
#: A tensor's dtype, sizes and strides.
_Like = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]


class Check:
    """Compares what nodes of ranks' programs make of shares with shares of what they make.
    Blocks that are alike are looked at once."""

    def __init__(self) -> None:
        self._found: dict[Any, Any] = {}

    def __call__(
        self,
        node: fx.Node,
        made: fx.Node,
        given: Mapping[fx.Node, tuple[fx.Node, Form]],
        axis: Axis,
        rank: int,
        shares: Shares,
    ) -> None:
        """Look at ``made``, which is in the program of ``rank`` what ``node`` is in the captured
        graph, for a share of ``axis``. ``given`` says of its inputs of which nodes they are, and in
        which form. Raises TokensError where it makes something else."""
        if operation(node) in _SIMPLE:
            return
        if made.target is operator.getitem or any(n not in given for n in made.all_input_nodes):
            return  # of what was looked at, or the last of several that do it together
        likes = {n: _like(s.meta["val"], form, rank, shares) for n, (s, form) in given.items()}
        key = made.target, _key(made.args, likes), _key(made.kwargs, likes)
        value = node.meta["val"]
        wanted = [(v.dtype, _local(v.shape, axis, rank, shares)) for v in _each(value)]
        try:
            if key not in self._found:
                self._found[key] = _run(made, likes)
            got = self._found[key]
        except NotImplementedError:  # torch cannot tell
            return
        except Exception as e:
            reason = str(e).strip().partition("\n")[0]
        else:
            if got == wanted:
                return
            reason = f"it makes {_text(got)} of it, and {_text(wanted)} is the share of the result"
        raise TokensError(
            f"the denoiser's tokens cannot be shared out among ranks: {operation(node)} "
            f"({node.name}) does not take a share of them: {reason}; {HINT}"
        )


def _each(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


def _local(shape: Any, axis: Axis, rank: int, shares: Shares) -> tuple[int, ...]:
    size = list(shape)
    size[axis.dim] = axis.local(rank, shares)
    return tuple(size)


def _like(value: torch.Tensor, form: Form, rank: int, shares: Shares) -> _Like:
    """A node's value in this form, with the strides of the whole."""
    axis = form.rows if isinstance(form, Mask) else None if isinstance(form, Keys) else form
    shape = tuple(value.shape) if axis is None else _local(value.shape, axis, rank, shares)
    return value.dtype, shape, value.stride()


def _key(argument: Any, likes: Mapping[fx.Node, _Like]) -> Any:
    if isinstance(argument, fx.Node):
        return likes[argument]
    if isinstance(argument, (list, tuple)):
        return tuple([_key(a, likes) for a in argument])
    if isinstance(argument, dict):
        return tuple([(name, _key(a, likes)) for name, a in argument.items()])
    return type(argument), argument


def _run(made: fx.Node, likes: Mapping[fx.Node, _Like]) -> list[tuple[torch.dtype, Any]]:
    """The dtypes and sizes of what a node makes."""

    def empty(node: fx.Node) -> torch.Tensor:
        dtype, shape, strides = likes[node]
        return torch.empty_strided(shape, strides, dtype=dtype, device=_META)

    args, kwargs = rehome(fx.map_arg((made.args, made.kwargs), empty), _META)
    with torch.no_grad():
        got = made.target(*args, **kwargs)  # type: ignore[operator]
    return [(v.dtype, tuple(v.shape)) for v in _each(got)]


def _text(values: Sequence[tuple[torch.dtype, Any]]) -> str:
    return ", ".join(f"{list(shape)} {str(dtype).split('.')[-1]}" for dtype, shape in values)
