"""torch.export of a denoiser: one graph with explicit inputs, and what each value depends on."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import CaptureError, InputError
from ..progress import stage
from .layers.attention import attend, backends_recorded
from .layers.casting import casts_traced
from .layers.quantized import has_labels, hidden, own_part, take_apart, with_labels
from .side_effects import refused
from .signature import Call, Role, Signature, values_in

log = logging.getLogger("asyncdiff")

_Operation = torch._ops.OpOverload
#: Nodes without effect on the result, which would pin the device of the export.
_DROPPED = (torch.ops.aten._assert_tensor_metadata.default,)

#: What the exporter says where a value of a tensor would have to be known.
_OF_VALUES = ("data-dependent", "data dependent", "unbacked")
#: What can always be done.
_WITHOUT = "run the denoiser without asyncdiff (restore())"
_VALUES = f"Its forward must not branch on values of tensors; else {_WITHOUT}"
_VERSION = f"Try another version of torch or of the denoiser's package; else {_WITHOUT}"
#: The exporter sets modes of the whole process, which two threads leave set for good.
_exporting = threading.Lock()


@dataclass
class Captured:
    """A denoiser as one flat graph of ATen operations.

    ``graph`` has a placeholder for every weight and every tensor argument. ``weights`` maps the
    former to their tensors (the module's own parameters, not copies), ``names`` to what the module
    calls them, ``inputs`` the latter to
    their index in ``signature.inputs``. ``outputs`` are the leaves of the result (nodes or
    constants), ``out_spec`` puts them back together. ``seconds`` is what the export took.
    ``variant`` are the nodes that depend on the latents, ``timed`` those that depend on the time
    but not on the latents, ``once`` those that depend on the conditioning but on neither.
    """

    graph: fx.Graph
    root: nn.Module
    signature: Signature
    weights: dict[str, torch.Tensor]
    names: dict[str, str]
    inputs: dict[str, int]
    outputs: list[Any]
    out_spec: pytree.TreeSpec
    seconds: float
    nodes: list[fx.Node] = field(default_factory=list)
    variant: set[fx.Node] = field(default_factory=set)
    timed: set[fx.Node] = field(default_factory=set)
    once: set[fx.Node] = field(default_factory=set)
    views: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.nodes = [n for n in self.graph.nodes if n.op == "call_function"]
        self.variant = self._descendants(Role.LATENTS)
        self.timed = self._descendants(Role.TIMESTEP) - self.variant
        self.once = self._descendants(Role.CONDITIONING) - self.variant - self.timed
        self.views = {n for n in self.nodes if _is_view(n)}

    def ownable(self, node: fx.Node) -> bool:
        """Whether a component may own ``node``.

        Values that do not depend on the latents, and views, cost nothing worth sending: whoever
        needs one computes it.
        """
        return node in self.variant and node not in self.views

    def each_run(self, node: fx.Node) -> bool:
        """Whether every run computes ``node``, rather than that it is computed ahead, once a
        generation or once a timestep (:mod:`asyncdiff.graph.hoist`)."""
        return node not in self.once and node not in self.timed

    def module_path(self, node: fx.Node) -> str:
        """Dotted path of the innermost module whose forward made this node ('' at the top)."""
        stack = node.meta.get("nn_module_stack") or {"": ("",)}
        # A module called twice appears as "path@1"; older exporters keep the name of the root.
        path: str = list(stack.values())[-1][0].split("@")[0]
        return path.removeprefix("L['self']").removeprefix(".")

    def unflatten(self, leaves: list[Any]) -> Any:
        """The denoiser's result from its leaves."""
        return pytree.tree_unflatten(leaves, self.out_spec)

    def _descendants(self, role: Role) -> set[fx.Node]:
        inputs = self.signature.inputs
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op == "placeholder":
                index = self.inputs.get(node.name)
                if index is not None and inputs[index].role is role:
                    found.add(node)
            elif any(source in found for source in node.all_input_nodes):
                found.add(node)
        return {n for n in found if n.op == "call_function"}


def capture(module: nn.Module, call: Call) -> Captured:
    """Export ``module`` for the shapes, dtypes and constants of ``call``.

    The weights may lie on any device, the meta device included; nothing is computed. Raises
    CaptureError with the exporter's reason.
    """
    name = type(module).__name__
    started = time.perf_counter()
    home = next((p.device for p in module.parameters()), torch.device("cpu"))
    kwargs = call.kwargs([torch.empty_like(x, device=home) for x in call.tensors])
    try:
        progress = stage("exporting the denoiser")
        valued = any(values_in(x, home) is not x for x in call.leaves)
        traced = _Traced(ahead=valued)
        with (
            _exporting,
            torch.no_grad(),
            _unlogged(),
            _without_source_lines(),
            progress,
            refused(module),
            casts_traced(module),
            backends_recorded(),
            traced,
        ):
            exported = _with_values(module, home) if valued else module
            exported = with_labels(exported) if has_labels(module) else exported
            program = torch.export.export(exported, (), kwargs, strict=False)
            targets = {n.target for n in program.graph.nodes}
            mutable = any(isinstance(t, _Operation) and t._schema.is_mutable for t in targets)
            if mutable or hidden(program):
                # In-place operations have no place in a graph that is cut into pieces.
                program = program.run_decompositions({})
    except CaptureError:
        raise
    except Exception as e:  # the exporter raises what it likes
        _check_inputs(module, kwargs, call)
        raise CaptureError(
            f"{name} cannot be exported by torch.export: {type(e).__name__}: {_first_lines(e)}. "
            + (_VALUES if any(words in str(e) for words in _OF_VALUES) else _VERSION)
        ) from e
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise CaptureError(f"{name} changes its own buffers or inputs in forward: put it in eval()")
    graph = program.graph
    for node in list(graph.nodes):
        if node.target in _DROPPED:
            graph.erase_node(node)
    weights, names, inputs = _placeholders(module, program, call)
    take_apart(graph, weights, names)
    captured = Captured(
        graph=graph,
        root=program.graph_module,
        signature=call.signature,
        weights=weights,
        names=names,
        inputs=inputs,
        outputs=list(graph.find_nodes(op="output")[0].args[0]),
        out_spec=program.call_spec.out_spec,
        seconds=time.perf_counter() - started,
    )
    _check_sizes(name, captured)
    log.info("captured %s: %d nodes in %.1f s", name, len(captured.nodes), captured.seconds)
    return captured


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

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function == _DATA:
            return args[0].detach()
        if function is scaled_dot_product_attention:
            return attend(*args, **(kwargs or {}))
        if function is torch.Tensor.fill_diagonal_ and args[0].dim() == 2 and len(args) == 2:
            args[0].diagonal().fill_(args[1])
            return args[0]
        if self._ahead:
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if _is_tensor(x)]
            if tensors and all(type(t) is torch.Tensor for t in tensors):
                with _disable_current_modes():
                    return function(*args, **(kwargs or {}))
            if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
                args = (args[0], _by_places(args[1]), *args[2:])
        return function(*args, **(kwargs or {}))


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


def _with_values(module: Any, home: torch.device) -> nn.Module:
    """The denoiser as another object, which takes tensors by their values."""
    if home.type == "meta":
        raise CaptureError(
            f"{type(module).__name__} has sizes that depend on values, which it has to compute "
            f"with, and its weights are nowhere: load it without a checkpoint, or {_WITHOUT}"
        )

    class Valued(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            args, kwargs = pytree.tree_map(lambda x: values_in(x, home), (args, kwargs))
            return super().forward(*args, **kwargs)

    other: nn.Module = object.__new__(Valued)
    object.__setattr__(other, "__dict__", module.__dict__)
    return other


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
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


def _check_inputs(module: nn.Module, kwargs: Mapping[str, Any], call: Call) -> None:
    """Raise InputError where the denoiser does not take these inputs, exported or not: tensors of
    their shapes, without memory, are passed to it as it is."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), _unlogged():
            module(**pytree.tree_map_only(torch.Tensor, mode.from_tensor, dict(kwargs)))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as e:
        if type(e).__module__.startswith("torch."):  # what only tracing minds, such as values
            return
        shapes = ", ".join(f"{x.name} {tuple(x.shape)}" for x in call.signature.inputs)
        raise InputError(
            f"{type(module).__name__} does not take these inputs ({shapes}): "
            f"{type(e).__name__}: {_first_lines(e)}"
        ) from e
    except Exception:
        return


def _check_sizes(name: str, captured: Captured) -> None:
    """Raise CaptureError where a size is known only from values, which fixed memory cannot hold, or
    an operation has a graph of its own (flexible attention)."""
    for node in captured.nodes:
        graphs = isinstance(node.target, torch._ops.HigherOrderOperator)
        if graphs and "attention" in str(node.target):
            where = captured.module_path(node) or "its forward"
            raise CaptureError(
                f"{name} uses {node.target} in {where}, which has a graph of its own: take the "
                f"default attention processor, or {_WITHOUT}"
            )
        if any(not isinstance(size, int) for t in tensors_of(node) for size in t.shape):
            raise CaptureError(
                f"{name} makes tensors whose size depends on values of its inputs ({node.target} "
                f"in {captured.module_path(node) or 'its forward'}; a mask of tokens, for "
                f"example), where asyncdiff needs sizes that are fixed: {_WITHOUT}"
            )


def _placeholders(
    module: nn.Module, program: Any, call: Call
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, int]]:
    weights: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    user = []
    for spec in program.graph_signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            user.append(str(getattr(spec.arg, "name", "")))
            continue
        names[spec.arg.name] = str(spec.target)
        if spec.target in program.state_dict:
            found = program.state_dict[spec.target]
            weights[spec.arg.name] = own_part(module, spec.target, found)
        else:
            weights[spec.arg.name] = program.constants[spec.target]
    if len(user) != len(call.leaves):
        raise CaptureError(f"torch.export made {len(user)} inputs of {len(call.leaves)} arguments")
    tensors = [n for n, leaf in zip(user, call.leaves, strict=True) if leaf is torch.Tensor]
    return weights, names, {name: index for index, name in enumerate(tensors)}


def tensors_of(node: fx.Node) -> list[torch.Tensor]:
    """The example tensors that a node produces: metadata only."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [v for v in values if isinstance(v, torch.Tensor)]


def nbytes_of(node: fx.Node) -> int:
    """Bytes of the tensors that a node produces."""
    return sum(t.numel() * t.element_size() for t in tensors_of(node))


def _is_view(node: fx.Node) -> bool:
    """Whether the node's result shares memory with one of its inputs."""
    theirs = {
        StorageWeakRef(t.untyped_storage()) for a in node.all_input_nodes for t in tensors_of(a)
    }
    if not isinstance(node.target, _Operation):  # getitem: a part of its input
        return bool(node.all_input_nodes) and _is_view(node.all_input_nodes[0])
    mine = {StorageWeakRef(t.untyped_storage()) for t in tensors_of(node)}
    return bool(mine & theirs)


def _first_lines(e: Exception, limit: int = 400) -> str:
    """The beginning of a message, without its line ends and whom to report it to."""
    text = re.sub(r"[^.\n]*file an issue[^.\n]*\.?", "", str(e), flags=re.IGNORECASE)
    text = " ".join(text.split()).rstrip(".")
    return text[:limit] + ("…" if len(text) > limit else "")
