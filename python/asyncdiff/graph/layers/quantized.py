"""Weights that are more than a tensor: quantised ones, of classes of their own.

There are two kinds. A *wrapper* (torchao) is a tensor in name only, made of plain ones, its codes
and scales, which operations on it take apart while they are traced: those become the weights. A
*labelled* one (GGUF, bitsandbytes) is a plain tensor of codes, whose class and attributes say how
its layer has to read it: the exporter puts plain tensors in the place of weights, so these are
given the same labels. Either way a component holds codes and scales, and decodes them in each run,
as the denoiser does.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...errors import InputError

_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)
#: Of whose layers the device of weights decides how they compute.
_AT_HOME = "bitsandbytes"
#: How the exporter writes that a wrapper is taken apart.
_PART = "access_subclass_inner_tensor"
#: What is in the names of weights that it took apart itself.
_TAKEN_APART = ".parametrizations."


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without gradient, and without a class and labels of its own."""
    if type(tensor) in _PLAIN or is_wrapper(tensor):
        return tensor.detach()
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def is_wrapper(tensor: Any) -> bool:
    """Whether a tensor is made of others."""
    return isinstance(tensor, torch.Tensor) and bool(is_traceable_wrapper_subclass(tensor))


def own_classes(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a module that are of classes of their own, by name."""
    weights = [*module.named_parameters(), *module.named_buffers()]
    return {name: w for name, w in weights if type(w) not in _PLAIN}


def stays_at_home(module: nn.Module) -> bool:
    """Whether a module's layers choose by the device of their weights how they compute
    (bitsandbytes), so that it has to stay where it is while it is exported for that device."""
    return any(type(w).__module__.startswith(_AT_HOME) for w in own_classes(module).values())


def settle_weights(module: nn.Module) -> None:
    """Have layers done with their weights what they do with them in their first call. Raises
    InputError where they compute with quantised ones in a way that no fixed graph has."""
    for path, layer in module.named_modules():
        threshold = getattr(getattr(layer, "state", None), "threshold", 0.0)
        if type(layer).__module__.startswith(_AT_HOME) and threshold:
            raise InputError(
                f"layer {path} is bitsandbytes' int8 with threshold {threshold:g}: by the values "
                "of its inputs it computes some columns apart, which no fixed graph has. Load the "
                "denoiser with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), in "
                "4 bits, or with torchao's int8"
            )
        packs = getattr(layer, "support_avx512bf16_for_cpu", False)
        if packs and all(w.device.type == "cpu" for w in layer.parameters()):
            raise InputError(
                f"layer {path} is bitsandbytes' 4-bit on a CPU, where it lays out its weights anew "
                "in its first call: move the pipeline to a GPU first, or take torchao or GGUF"
            )
        # Of bitsandbytes' int8, codes and scales go from the weight to the layer.
        if getattr(getattr(layer, "weight", None), "CB", None) is not None:
            layer.init_8bit_state()


def has_labels(module: nn.Module) -> bool:
    """Whether some weights of a module are labelled."""
    return bool(_labelled(module))


def _labelled(module: nn.Module) -> list[tuple[dict[str, Any], str, torch.Tensor]]:
    """Where labelled weights stand, and these."""
    return [
        (where, name, weight)
        for layer in module.modules()
        for where in (layer._parameters, layer._buffers)
        for name, weight in where.items()
        if weight is not None and type(weight) not in _PLAIN and not is_wrapper(weight)
    ]


def with_labels(module: nn.Module) -> nn.Module:
    """The denoiser as another object, in whose calls what stands in the place of labelled weights
    has their labels."""
    labelled = _labelled(module)

    class Labelled(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            for where, name, weight in labelled:
                if type(where[name]) is not type(weight):
                    _label(where[name], weight)
            return super().forward(*args, **kwargs)

    other: nn.Module = object.__new__(Labelled)
    object.__setattr__(other, "__dict__", module.__dict__)
    return other


def _label(tensor: torch.Tensor, like: torch.Tensor) -> None:
    """Give a tensor the attributes and methods that another one has besides a tensor's own."""
    labels = dict(vars(like))
    for cls in reversed(type(like).__mro__):
        if cls not in nn.Parameter.__mro__:
            labels |= {
                name: types.MethodType(method, tensor)
                for name, method in vars(cls).items()
                if isinstance(method, types.FunctionType) and not hasattr(torch.Tensor, name)
            }
    # What GGUF's are without their class, in a way that no tracing follows.
    if "as_tensor" in labels:
        labels["as_tensor"] = lambda: tensor
    vars(tensor).update(labels)


@contextlib.contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Wrappers among the weights of a module ask for no gradient meanwhile: the exporter makes
    parameters of what they are made of, which codes that are integers cannot be otherwise."""
    asking = [w for w in own_classes(module).values() if is_wrapper(w) and w.requires_grad]
    try:
        for weight in asking:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)


def hidden(program: Any) -> bool:
    """Whether an exported program has wrappers of which operations do not show, without being
    decomposed, what they do with the tensors inside."""
    return any(
        is_wrapper(program.state_dict.get(spec.target))
        and any(_PART not in str(user.target) for user in node.users)
        for spec, node in zip(
            program.graph_signature.input_specs,
            program.graph.find_nodes(op="placeholder"),
            strict=True,
        )
    )


def take_apart(graph: fx.Graph, weights: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    """Put placeholders for the tensors that wrappers are made of in the place of those for the
    wrappers, in an exported graph and in what is known of its placeholders."""
    todo = [n for n in graph.find_nodes(op="placeholder") if is_wrapper(weights.get(n.name))]
    while todo:
        node = todo.pop()
        whole, name = weights.pop(node.name), names.pop(node.name)
        parts: dict[str, fx.Node] = {}
        for user in list(node.users):
            part = str(user.args[1])
            if part not in parts:
                with graph.inserting_after(node):
                    parts[part] = made = graph.placeholder(f"{node.name}_{part}")
                made.meta = dict(user.meta)
                weights[made.name], names[made.name] = getattr(whole, part), f"{name}.{part}"
            user.replace_all_uses_with(parts[part])
            graph.erase_node(user)
        todo += [made for made in parts.values() if is_wrapper(weights[made.name])]
        graph.erase_node(node)


def move(module: nn.Module, device: torch.device) -> None:
    """``module.to(device)``, also where somebody has weak references to wrappers among its weights,
    as torch's exporter and compiler do: torch does not move these in place then, so others that are
    equal take theirs."""
    try:
        nn.Module.to(module, device)
        return
    except RuntimeError as e:
        if "swap" not in str(e):
            raise
    moved: dict[int, nn.Parameter] = {}
    for layer in module.modules():
        for name, weight in layer._parameters.items():
            if weight is None or weight.device == device:
                continue
            if id(weight) not in moved:
                to = weight.detach().to(device)
                moved[id(weight)] = nn.Parameter(to, requires_grad=weight.requires_grad)
            layer._parameters[name] = moved[id(weight)]
    nn.Module.to(module, device)  # buffers


def own_part(module: nn.Module, name: str, found: torch.Tensor) -> torch.Tensor:
    """The tensor in a module's wrapper that a decomposed program knows by another object."""
    path, _, last = name.partition(_TAKEN_APART)
    if not last:
        return found
    whole = getattr(module.get_submodule(path), last.rpartition(".")[0], None)
    if whole is None:  # a tensor of somebody else's parametrization
        return found
    same = (
        p for p in parts_of(whole) if p.data_ptr() == found.data_ptr() and p.dtype == found.dtype
    )
    return next(same, found)


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a weight is made of: itself, if it is no wrapper."""
    if not is_wrapper(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names:
        yield from parts_of(getattr(tensor, name))
