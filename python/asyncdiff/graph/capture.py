"""torch.export of a denoiser: one graph with explicit inputs, and what each value depends on."""

from __future__ import annotations

import contextlib
import logging
import re
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InputError
from ..progress import stage
from .export import WITHOUT, export, unlogged
from .layers.products import fill_rows
from .layers.quantized import own_part, take_apart
from .signature import Call, Role, Signature, is_input
from .state.numbers import Guards, Numbers
from .state.structure import Structure
from .state.values import values_in
from .tracing.symbols import OpenSizes
from .tracing.where import where

log = logging.getLogger("asyncdiff")

_Operation = torch._ops.OpOverload
T = TypeVar("T")
#: In the metadata of a node: its value lies in memory of what it is made of.
VIEW = "asyncdiff_view"
#: Nodes without effect on the result, which would pin the device of the export.
_DROPPED = (torch.ops.aten._assert_tensor_metadata.default,)

#: What the exporter says where a value of a tensor would have to be known.
_OF_VALUES = ("data-dependent", "data dependent", "unbacked")
_VALUES = f"Its forward must not branch on values of tensors; else {WITHOUT}"
_VERSION = f"Try another version of torch or of the denoiser's package; else {WITHOUT}"


@dataclass
class Captured:
    """A denoiser as one flat graph of ATen operations.

    ``graph`` has a placeholder for every weight and every tensor argument. ``weights`` maps the
    former to their tensors (the module's own parameters, not copies; of numbers that may be moved,
    float64 without dimensions), ``names`` to what the module calls them, ``places`` to their names
    in a :class:`~.state.structure.Structure`, of those that have one; ``inputs`` the latter to
    their index in ``signature.inputs``. ``outputs`` are the leaves of the result (nodes or
    constants), ``out_spec`` puts them back together. ``guards`` tell for which numbers the graph is
    right. ``seconds`` is what the export took.
    ``variant`` are the nodes that depend on the latents, ``timed`` those that depend on the time
    but not on the latents, ``once`` those that depend on the conditioning but on neither.
    """

    graph: fx.Graph
    root: nn.Module
    signature: Signature
    weights: dict[str, torch.Tensor]
    names: dict[str, str]
    places: dict[str, str]
    inputs: dict[str, int]
    outputs: list[Any]
    out_spec: pytree.TreeSpec
    guards: Guards
    seconds: float
    nodes: list[fx.Node] = field(default_factory=list)
    variant: set[fx.Node] = field(default_factory=set)
    timed: set[fx.Node] = field(default_factory=set)
    once: set[fx.Node] = field(default_factory=set)
    views: set[fx.Node] = field(default_factory=set)
    #: what was worked out of the nodes, which stay what they are, by what it is
    known: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.nodes = [n for n in self.graph.nodes if n.op == "call_function"]
        self.variant = self._descendants(Role.LATENTS)
        self.timed = self._descendants(Role.TIMESTEP) - self.variant
        self.once = self._descendants(Role.CONDITIONING) - self.variant - self.timed
        self.views = {n for n in self.nodes if _is_view(n)}
        for node in self.views:
            node.meta[VIEW] = True

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

    def once_known(self, what: str, work_out: Callable[[], T]) -> T:
        """What ``work_out`` makes of the nodes, and of nothing else: worked out once."""
        if what not in self.known:
            self.known[what] = work_out()
        found: T = self.known[what]
        return found

    def follow(self, structure: Structure) -> None:
        """Take the weights and numbers that the denoiser has now, which is made of the same layers
        as when it was exported."""
        for name, place in self.places.items():
            slot = structure.slots.get(place)
            if slot is None:
                self.weights[name] = structure.tensors[place]
            elif float(self.weights[name]) != slot.value:
                self.weights[name].fill_(slot.value)

    def let_go(self) -> None:
        """Hold no weights of the module any more, until :meth:`follow`."""
        for name in self.places:
            if name in self.weights and self.weights[name].dim():
                del self.weights[name]

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


@contextlib.contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """Weights that were made in inference mode ask for no gradients meanwhile: the exporter passes
    on to values which of them do, and outside of that mode those that were made of such weights
    cannot take it."""
    asking = [w for w in module.parameters() if w.requires_grad and w.is_inference()]
    with torch.inference_mode():
        for weight in asking:
            weight.requires_grad_(False)
    try:
        yield
    finally:
        with torch.inference_mode():
            for weight in asking:
                weight.requires_grad_(True)


def capture(module: nn.Module, call: Call, open_sizes: OpenSizes | None = None) -> Captured:
    """Export ``module`` for the shapes, dtypes and constants of ``call``. Sizes in ``open_sizes``
    stay symbols, if they can (:mod:`.tracing.resizing` puts numbers in their place).

    The weights may lie on any device, the meta device included; nothing is computed. Raises
    CaptureError with the exporter's reason.
    """
    name = type(module).__name__
    started = time.perf_counter()
    home = next((p.device for p in module.parameters()), torch.device("cpu"))
    tensors = [torch.empty_like(x, device=home) for x in call.tensors]
    kwargs = call.kwargs(tensors, number=lambda tensor: tensor)
    structure = Structure(module)
    _check_leaves(name, call)
    with stage("exporting the denoiser"):  # what listeners raise is no fault of the denoiser's
        program, numbers = _exported(module, kwargs, call, structure, home, open_sizes)
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise CaptureError(f"{name} changes its own buffers or inputs in forward: put it in eval()")
    graph = program.graph
    for node in list(graph.nodes):
        if node.target in _DROPPED:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    weights, names, inputs = _placeholders(module, program, call)
    take_apart(graph, weights, names)
    fill_rows(graph)
    _drop_unused(graph, weights, names, set(program.constants))
    of_numbers = {id(tensor): n for n, tensor in numbers.tensors.items()}
    places = {n: of_numbers.get(id(w)) or structure.name_of(w) for n, w in weights.items()}
    captured = Captured(
        graph=graph,
        root=program.graph_module,
        signature=call.signature,
        weights=weights,
        names=names,
        places={n: place for n, place in places.items() if place is not None},
        inputs=inputs,
        outputs=list(graph.find_nodes(op="output")[0].args[0]),
        out_spec=program.call_spec.out_spec,
        guards=numbers.guards,
        seconds=time.perf_counter() - started,
    )
    if open_sizes is None:
        _check_sizes(name, captured)
    log.info("captured %s: %d nodes in %.1f s", name, len(captured.nodes), captured.seconds)
    return captured


def _exported(
    module: nn.Module,
    kwargs: dict[str, Any],
    call: Call,
    structure: Structure,
    home: torch.device,
    open_sizes: OpenSizes | None,
) -> tuple[Any, Numbers]:
    """The program of torch.export, and the numbers that are inputs of it. Raises CaptureError with
    the exporter's reason, InputError where the denoiser does not take these inputs."""
    try:
        with _without_gradients(module):
            return export(module, kwargs, call, structure, home, open_sizes)
    except CaptureError:
        raise
    except Exception as e:  # the exporter raises what it likes
        if open_sizes is None:
            _check_inputs(module, kwargs, call, home)
        raise CaptureError(
            f"{type(module).__name__} cannot be exported by torch.export: {type(e).__name__}: "
            f"{_first_lines(e)}{where(module, e)}. "
            + (_VALUES if any(words in str(e) for words in _OF_VALUES) else _VERSION)
        ) from e


def _check_leaves(name: str, call: Call) -> None:
    """Raise CaptureError for arguments that are functions."""
    for given, leaf in zip(call.names, call.leaves, strict=True):
        if isinstance(leaf, (types.FunctionType, types.MethodType)):
            raise CaptureError(
                f"{name} is given a function ({given}: {leaf.__qualname__}), as a BlockMask of "
                f"flexible attention has one, which is no input of a graph: {WITHOUT}"
            )


def _check_inputs(
    module: nn.Module, kwargs: Mapping[str, Any], call: Call, home: torch.device
) -> None:
    """Raise InputError where the denoiser does not take these inputs, exported or not: tensors of
    their shapes, without memory, are passed to it as it is."""
    try:
        # Constants may stand for tensors' values.
        given = pytree.tree_map_only(str, lambda x: values_in(x, home), dict(kwargs))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), unlogged():
            module(**pytree.tree_map_only(torch.Tensor, mode.from_tensor, given))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as e:
        if type(e).__module__.startswith("torch."):  # what only tracing minds, such as values
            return
        shapes = ", ".join(f"{x.name} {tuple(x.shape)}" for x in call.signature.inputs)
        raise InputError(
            f"{type(module).__name__} does not take these inputs ({shapes}): "
            f"{type(e).__name__}: {_first_lines(e)}{where(module, e)}"
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
                f"default attention processor, or {WITHOUT}"
            )
        if any(not isinstance(size, int) for t in tensors_of(node) for size in t.shape):
            raise CaptureError(
                f"{name} makes tensors whose size depends on values of its inputs ({node.target} "
                f"in {captured.module_path(node) or 'its forward'}; a mask of tokens, for "
                f"example), where asyncdiff needs sizes that are fixed: {WITHOUT}"
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
    tensors = [n for n, leaf in zip(user, call.leaves, strict=True) if is_input(leaf)]
    return weights, names, {name: index for index, name in enumerate(tensors)}


def _drop_unused(
    graph: fx.Graph, weights: dict[str, torch.Tensor], names: dict[str, str], constants: set[str]
) -> None:
    """Take away constants of which nothing is made."""
    for node in graph.find_nodes(op="placeholder"):
        if not node.users and names.get(node.name) in constants:
            del weights[node.name], names[node.name]
            graph.erase_node(node)


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
