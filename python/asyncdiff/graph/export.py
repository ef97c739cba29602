"""torch.export of a denoiser, with what stands in the way of it cleared away."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import CaptureError
from ..progress import stage
from .layers.attention import attend, backends_recorded
from .layers.casting import casts_traced
from .layers.containers import register_containers
from .layers.functional import replace_writes, writes
from .layers.quantized import has_labels, hidden, is_wrapper, with_labels, without_gradients
from .side_effects import refused
from .signature import Call
from .state.numbers import Argument, FrozenError, Numbers
from .state.structure import Structure
from .state.values import values_in

#: What can always be done.
WITHOUT = "run the denoiser without asyncdiff (restore())"
#: The exporter sets modes of the whole process, which two threads leave set for good.
_exporting = threading.Lock()


def export(
    module: nn.Module,
    kwargs: dict[str, Any],
    call: Call,
    structure: Structure,
    home: torch.device,
) -> tuple[Any, Numbers]:
    """The program of torch.export for a call with these arguments, and the numbers that are inputs
    of it. Raises what the exporter does."""
    valued = any(values_in(x, home) is not x for x in call.leaves)
    # What is computed ahead is computed with the numbers that there are.
    frozen = set(structure.slots) if valued else set[str]()
    while True:
        numbers = Numbers(structure.slots.values(), frozen)
        try:
            with (
                _exporting,
                torch.no_grad(),
                unlogged(),
                _without_source_lines(),
                stage("exporting the denoiser"),
                numbers.standing_in(),
                refused(module),
                casts_traced(module),
                without_gradients(module),
                backends_recorded(),
                _Traced(ahead=valued),
            ):
                exported = _taking(module, call, home) if valued or float in call.leaves else module
                exported = with_labels(exported) if has_labels(module) else exported
                program = _exported(exported, kwargs)
                written = any(map(writes, program.graph.nodes))
                if hidden(program) or (written and not replace_writes(program.graph)):
                    program = program.run_decompositions({})
            return program, numbers
        except FrozenError as e:
            if e.names <= frozen | {*call.names}:
                raise CaptureError(
                    f"{type(module).__name__} uses a scale in a way that is not known ({e})"
                ) from e
            frozen |= e.names


def _exported(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """The program of torch.export, also where the denoiser returns objects that hold tensors."""
    try:
        return torch.export.export(module, (), kwargs, strict=False)
    except Exception as e:
        if "not a known type" not in str(e):
            raise

    class Returning(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            result = super().forward(*args, **kwargs)
            register_containers(pytree.tree_leaves(result))
            return result

    other: nn.Module = object.__new__(Returning)
    object.__setattr__(other, "__dict__", module.__dict__)
    return torch.export.export(other, (), kwargs, strict=False)


_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class _Traced(TorchFunctionMode):
    """Operations in the place of some that the exporter does not trace: it does not see
    ``tensor.data``, and takes what is made of it for a constant; and it cannot take apart what is
    written through the strides of a view, as ``fill_diagonal_`` does. Attention is by
    the kernels that are chosen now. ``ahead``: what is made of tensors alone that have values is
    computed at once, so that sizes may depend on it."""

    def __init__(self, *, ahead: bool) -> None:
        super().__init__()
        self._ahead = ahead
        #: in a linear layer of a weight that is a wrapper
        self._within = False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function == _DATA:
            return args[0].detach()
        linear = function is torch.nn.functional.linear and len(args) > 1
        if linear and is_wrapper(args[1]) and not self._within:
            return self._linear(types, args, kwargs or {})
        # So asks optimum-quanto of an input that is traced, for it is no plain torch.Tensor.
        if self._within and function is torch.Tensor.dequantize and not args[0].is_quantized:
            return args[0]
        if function is scaled_dot_product_attention:
            return attend(*args, **(kwargs or {}))
        if function is torch.Tensor.fill_diagonal_ and args[0].dim() == 2 and len(args) == 2:
            args[0].diagonal().fill_(args[1])
            return args[0]
        if self._ahead:
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if _is_tensor(x)]
            whole = not getattr((kwargs or {}).get("dtype"), "is_floating_point", True)
            made = function in (torch.zeros, torch.ones, torch.arange) and whole  # masks
            if made or (tensors and all(type(t) is torch.Tensor for t in tensors)):
                with _disable_current_modes():
                    return function(*args, **(kwargs or {}))
            if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
                args = (args[0], _by_places(args[1]), *args[2:])
        return function(*args, **(kwargs or {}))

    def _linear(self, types: Any, args: Any, kwargs: Any) -> Any:
        """What a wrapper makes of a linear layer, seen here, too: by itself torch looks away while
        a mode calls functions."""
        self._within = True
        try:
            with self:
                own = type(args[1]).__torch_function__
                return own(torch.nn.functional.linear, types, args, kwargs)
        finally:
            self._within = False


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def _by_places(index: Any) -> Any:
    """An index with the places of what masks choose in place of the masks."""
    found: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        if type(part) is torch.Tensor and part.dtype is torch.bool:
            with _disable_current_modes():
                found += part.nonzero(as_tuple=True)
        else:
            found.append(part)
    return tuple(found)


def _taking(module: Any, call: Call, home: torch.device) -> nn.Module:
    """The denoiser as another object, which takes constants that are values of tensors as these,
    and tensors that stand for numbers as such."""
    name = type(module).__name__
    if home.type == "meta" and float not in call.leaves:
        raise CaptureError(
            f"{name} has sizes that depend on values, which it has to compute with, and its "
            f"weights are nowhere: load it without a checkpoint, or {WITHOUT}"
        )

    class Taking(type(module)):  # type: ignore[misc]
        def forward(self, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten(kwargs)
            taken = [
                Argument(name, x) if mark is float else values_in(x, home)
                for name, mark, x in zip(call.names, call.leaves, leaves, strict=True)
            ]
            return super().forward(**pytree.tree_unflatten(taken, spec))

    other: nn.Module = object.__new__(Taking)
    object.__setattr__(other, "__dict__", module.__dict__)
    return other


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Without the pages that torch logs of operations that fail on tensors without memory: the
    error that is raised says the same in a line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
    """Nobody asks where in the denoiser's source a node comes from, which takes a fourth of the
    time of an export to find out."""
    option = "do_not_emit_stack_traces"
    before = getattr(fx.config, option, None)
    if before is None:  # older torch
        yield
        return
    setattr(fx.config, option, True)
    try:
        yield
    finally:
        setattr(fx.config, option, before)
