"""torch.export of a denoiser, with what stands in the way of it cleared away."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import _trace
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..memory import uncollected
from .layers.attention import backends_recorded
from .layers.casting import casts_traced
from .layers.containers import register_containers
from .layers.functional import replace_writes, writes
from .layers.quantized import has_labels, hidden, own_classes, with_labels, without_gradients
from .side_effects import attributes_kept, refused
from .signature import Call
from .state.numbers import Argument, FrozenError, Numbers
from .state.structure import Structure
from .state.values import not_zero, values_in
from .tracing.bodies import UnfollowedError
from .tracing.lazy_code import uncompiled
from .tracing.repeats import Repeats
from .tracing.symbols import OpenSizes, dynamic_shapes, symbols_kept
from .tracing.traced import Traced

#: What can always be done.
WITHOUT = "run the denoiser without asyncdiff (restore())"
#: The exporter sets modes of the whole process, which two threads leave set for good.
_exporting = threading.Lock()
#: Where torch looks at tensors' metadata, a hundred times at each: of module and name.
_LOOKING = ((proxy_tensor, "track_tensor_tree"), (_trace, "_fakify_params_buffers"))
#: Where it notes which node has made which symbol, and the metadata in which it does.
_BINDING, _BOUND = "_replace_unbacked_bindings", "unbacked_bindings"
#: What of torch logs pages.
_LOUD = ("_subclasses.fake_tensor", "fx.experimental.symbolic_shapes")


def export(
    module: nn.Module,
    kwargs: dict[str, Any],
    call: Call,
    structure: Structure,
    home: torch.device,
    open_sizes: OpenSizes | None = None,
) -> tuple[Any, Numbers]:
    """The program of torch.export for a call with these arguments, and the numbers that are inputs
    of it. Sizes in ``open_sizes`` stay symbols in it, if they can. Raises what the exporter
    does."""
    some = not_zero(call)
    valued = bool(some) or any(values_in(x, home) is not x for x in call.leaves)
    # What is computed ahead is computed with the numbers that there are.
    frozen = set(structure.slots) if valued else set[str]()
    while True:
        numbers, traced = Numbers(structure.slots.values(), frozen), Traced(ahead=valued)
        try:
            with (
                _exporting,
                torch.no_grad(),
                unlogged(),
                _without_source_lines(),
                _without_bindings(),
                _quietly(module),
                uncompiled(),
                numbers.standing_in(),
                refused(module),
                casts_traced(module),
                without_gradients(module),
                backends_recorded(),
                uncollected(),
                traced,
                symbols_kept(module) if open_sizes else contextlib.nullcontext(),
            ):
                exported = module
                if valued or float in call.leaves:
                    exported = _taking(module, call, home, traced, some)
                exported = with_labels(exported) if has_labels(module) else exported
                shapes = None if open_sizes is None else dynamic_shapes(call, open_sizes)
                alike = exported is module and shapes is None
                program = _exported(exported, kwargs, shapes, repeats=alike)
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


def _exported(module: nn.Module, kwargs: dict[str, Any], shapes: Any, repeats: bool) -> Any:
    """The program of torch.export, also where the denoiser returns objects that hold tensors. With
    ``repeats`` layers that are like others are not traced once more."""
    try:
        if repeats:
            with contextlib.suppress(UnfollowedError):
                return _once_each(module, kwargs)
        return _plainly(module, kwargs, shapes)
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
    return _plainly(other, kwargs)


def _plainly(module: nn.Module, kwargs: dict[str, Any], shapes: Any = None) -> Any:
    with attributes_kept(module):
        return torch.export.export(module, (), kwargs, strict=False, dynamic_shapes=shapes)


def _once_each(module: nn.Module, kwargs: dict[str, Any]) -> Any:
    """The program of torch.export, for which layers that are alike are traced once. Raises
    UnfollowedError where they have to be traced all."""
    repeats = Repeats(module)
    with repeats.standing_in():
        program = _plainly(module, kwargs)
    repeats.put_in(program)
    return program


def _taking(
    module: Any, call: Call, home: torch.device, traced: Traced, some: Collection[str]
) -> nn.Module:
    """The denoiser as another object, which takes constants that are values of tensors as these,
    and tensors that stand for numbers as such; ``some`` are the inputs that are not all 0."""
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
            for name, x in zip(call.names, leaves, strict=True):
                if name in some:
                    traced.not_zero(x)
            return super().forward(**pytree.tree_unflatten(taken, spec))

    other: nn.Module = object.__new__(Taking)
    object.__setattr__(other, "__dict__", module.__dict__)
    return other


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Without the pages that torch logs of operations that fail on tensors without memory or on
    values that are not known, and the graph so far that its exporter prints then: the error that is
    raised says the same in a line."""
    loggers = [logging.getLogger(f"torch.{name}") for name in _LOUD]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    shadow = vars(_trace).setdefault("print", lambda *_, **__: None)
    try:
        yield
    finally:
        if vars(_trace).get("print") is shadow:
            del vars(_trace)["print"]
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


@contextlib.contextmanager
def _quietly(module: nn.Module) -> Iterator[None]:
    """Where torch only looks at metadata, modes that see each look are passed by: they take much
    of the time of an export. Weights of classes of their own may answer otherwise then."""
    quiet = () if own_classes(module) else _LOOKING
    before = [(where, name, getattr(where, name, None)) for where, name in quiet]

    def passing_by(function: Any) -> Any:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                return function(*args, **kwargs)

        return called

    for where, name, function in before:
        if function is not None:  # in this version of torch
            setattr(where, name, passing_by(function))
    try:
        yield
    finally:
        for where, name, function in before:
            if function is not None:
                setattr(where, name, function)


@contextlib.contextmanager
def _without_bindings() -> Iterator[None]:
    """Where all sizes are numbers, torch does not look through the values of all nodes for symbols
    of which it does not know the values."""
    bind = getattr(_trace, _BINDING, None)
    if bind is None:  # another version of torch
        yield
        return

    def needed(graph_module: fx.GraphModule) -> None:
        nodes = graph_module.graph.nodes
        with torch._C.DisableTorchFunction():
            known = all(_BOUND not in n.meta and _of_numbers(n.meta.get("val")) for n in nodes)
        if not known:
            bind(graph_module)

    setattr(_trace, _BINDING, needed)
    try:
        yield
    finally:
        setattr(_trace, _BINDING, bind)


def _of_numbers(value: Any) -> bool:
    """Whether there is no symbol in a node's value."""
    if type(value) is FakeTensor:
        return value.layout is torch.strided and not value._has_symbolic_sizes_strides
    if isinstance(value, (list, tuple)):
        return all(map(_of_numbers, value))
    return value is None or type(value) in (bool, int, float, str)


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
    """Nobody asks where in the denoiser's source a node comes from, which takes a fourth of the
    time of an export to find out."""
    option = "do_not_emit_stack_traces"
    if hasattr(fx.config, option):
        before = getattr(fx.config, option)
        setattr(fx.config, option, True)
        try:
            yield
        finally:
            setattr(fx.config, option, before)
        return
    # Torch 2.11 has no such option, and each tracer sets for itself what this is in the place of.
    tracer: Any = getattr(proxy_tensor, "_ModuleStackTracer", None)
    if tracer is None:
        yield
        return
    tracer.record_stack_traces = property(lambda _: False, lambda *_: None)
    try:
        yield
    finally:
        del tracer.record_stack_traces
