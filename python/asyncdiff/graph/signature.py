"""The call of a denoiser, taken apart: named tensors with a role, and constants.

A denoiser's arguments become flat, named leaves in the order of its signature, so that the rest of
the package never needs to know what a particular model's ``forward`` looks like.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InputError

#: Argument names of the latents, most specific first; else the first tensor argument.
LATENTS = ("sample", "hidden_states", "latents", "x")
#: Argument names of the timestep; else the second tensor argument.
TIMESTEP = ("timestep", "timesteps", "t", "time")
#: Arguments that change with the latents in every step: a ControlNet's or an adapter's output.
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
)


class Role(str, Enum):
    """What an input is to the sampler."""

    LATENTS = "latents"  #: changes every step, with the latents
    TIMESTEP = "timestep"  #: the step's time, known ahead of the step
    CONDITIONING = "conditioning"  #: the same in every step of a generation


@dataclass(frozen=True)
class Input:
    """One tensor argument: its dotted name, role, shape and dtype."""

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Signature:
    """What must be equal for two calls to be served by the same prepared denoiser."""

    inputs: tuple[Input, ...]
    constants: tuple[tuple[str, Any], ...]
    tree: str

    @cached_property
    def places(self) -> Mapping[Role, tuple[int, ...]]:
        """Positions in ``inputs`` by role."""
        return {
            role: tuple(i for i, x in enumerate(self.inputs) if x.role is role) for role in Role
        }


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: ``tensors`` in the order of ``signature.inputs``."""

    signature: Signature
    tensors: tuple[torch.Tensor, ...]
    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec

    def kwargs(self) -> dict[str, Any]:
        """The call's arguments, by keyword."""
        return pytree.tree_unflatten(list(self.leaves), self.spec)

    def indices(self, role: Role) -> tuple[int, ...]:
        """Positions in ``tensors`` of the inputs with this role."""
        return self.signature.places[role]

    def replacing(self, index: int, tensor: torch.Tensor) -> Call:
        """The same call with another tensor, of the same shape and dtype, at ``tensors[index]``."""
        leaves, tensors = list(self.leaves), list(self.tensors)
        place = next(i for i, x in enumerate(leaves) if x is tensors[index])
        leaves[place] = tensors[index] = tensor
        return replace(self, tensors=tuple(tensors), leaves=tuple(leaves))


def parse(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    latents: str | None = None,
    timestep: str | None = None,
) -> Call:
    """Take the call ``module(*args, **kwargs)`` apart.

    ``latents`` and ``timestep`` name those arguments where the names in :data:`LATENTS` and
    :data:`TIMESTEP` do not. Raises InputError where the arguments do not fit the signature, have
    no tensor for the latents, or one whose gradient would be lost, CaptureError for a ``forward``
    with ``*args``.
    """
    arguments = _bind(module, args, kwargs)
    time_name = timestep or next((n for n in TIMESTEP if n in arguments), None)
    value = arguments.get(time_name) if time_name else None
    if time_name is not None and isinstance(value, (int, float)) and not isinstance(value, bool):
        # A Python number would be frozen into the exported graph.
        arguments[time_name] = torch.tensor(value)
    pairs, spec = pytree.tree_flatten_with_path(arguments)
    names = [".".join(_key(k) for k in path) for path, _ in pairs]
    leaves = [leaf for _, leaf in pairs]
    tensors = [n for n, leaf in zip(names, leaves, strict=True) if isinstance(leaf, torch.Tensor)]
    latent_name = _choose("latents", latents, LATENTS, tensors, 0)
    time_name = _choose("timestep", timestep, TIMESTEP, tensors, 1)
    by_name = {n: x for n, x in zip(names, leaves, strict=True) if n in tensors and n != time_name}
    more_latents = _alike(latent_name, by_name)
    inputs, constants = [], []
    for name, leaf in zip(names, leaves, strict=True):
        if not isinstance(leaf, torch.Tensor):
            constants.append((name, _hashable(name, leaf)))
            continue
        root = name.split(".")[0]
        role = Role.CONDITIONING
        if name == latent_name or name in more_latents or root in RESIDUALS:
            role = Role.LATENTS
        elif name == time_name:
            role = Role.TIMESTEP
        inputs.append(Input(name, role, tuple(leaf.shape), leaf.dtype))
    signature = Signature(tuple(inputs), tuple(constants), str(spec))
    values = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    if torch.is_grad_enabled():
        _check_gradients(values)
    return Call(signature, values, tuple(leaves), spec)


class Parser:
    """Takes calls of one module apart, quickly where they are like the one before.

    ``latents`` and ``timestep``: see :func:`parse`.
    """

    def __init__(
        self, module: nn.Module, latents: str | None = None, timestep: str | None = None
    ) -> None:
        self._module = module
        self._names = {"latents": latents, "timestep": timestep}
        self._last: _Shape | None = None

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The call ``module(*args, **kwargs)``; raises what :func:`parse` does."""
        given, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        last = self._last
        if last is None or spec != last.spec or not last.fits(given):
            call = parse(self._module, args, kwargs, **self._names)
            self._last = _Shape.of(self._module, given, spec, call)
            return call
        leaves = tuple([given[i] for i in last.order])
        tensors = tuple([given[i] for i in last.tensors])
        if torch.is_grad_enabled():
            _check_gradients(tensors)
        return replace(last.call, tensors=tensors, leaves=leaves)


@dataclass(frozen=True)
class _Shape:
    """What calls have to be like so that they are taken apart as ``call`` was.

    ``spec`` and ``given`` are arguments as they were passed: shape and dtype of tensors, all else
    as it is. ``order`` says where the call's leaves stand among them, ``tensors`` where its tensors
    do. ``call`` has no tensors.
    """

    spec: pytree.TreeSpec
    given: tuple[Any, ...]
    order: tuple[int, ...]
    tensors: tuple[int, ...]
    call: Call

    @classmethod
    def of(
        cls, module: nn.Module, given: list[Any], spec: pytree.TreeSpec, call: Call
    ) -> _Shape | None:
        """None where a leaf of the call was made, not given: a timestep that is a number."""
        args, kwargs = pytree.tree_unflatten(list(range(len(given))), spec)
        order = tuple(pytree.tree_leaves(_bind(module, args, kwargs)))
        if any(given[i] is not leaf for i, leaf in zip(order, call.leaves, strict=True)):
            return None
        return cls(
            spec,
            tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in given),
            order,
            tuple(i for i in order if isinstance(given[i], torch.Tensor)),
            replace(call, tensors=(), leaves=()),
        )

    def fits(self, given: list[Any]) -> bool:
        """Whether these arguments, of the same tree, are like those."""
        for now, then in zip(given, self.given, strict=True):
            if isinstance(now, torch.Tensor):
                if not isinstance(then, tuple) or now.shape != then[0] or now.dtype != then[1]:
                    return False
            elif now is not then and (type(now) is not type(then) or now != then):
                return False
        return True


def _check_gradients(tensors: Sequence[torch.Tensor]) -> None:
    """Raise InputError for inputs whose gradient would be cut."""
    if any(tensor.requires_grad for tensor in tensors):
        raise InputError(
            "an input of the denoiser asks for its gradient, which ranks do not compute: call it "
            "under torch.no_grad(), or take gradients without asyncdiff (restore())"
        )


def check_devices(call: Call, cuda: bool) -> None:
    """Raise InputError for tensors on a kind of device that the ranks cannot read."""
    for x, tensor in zip(call.signature.inputs, call.tensors, strict=True):
        wrong = tensor.device.type != ("cuda" if cuda else "cpu")
        if wrong and not (cuda and tensor.device.type == "cpu" and tensor.dim() == 0):
            where = "a GPU" if cuda else "the CPU"
            raise InputError(
                f"{x.name} is on {tensor.device}, but the ranks run on {where}: move the pipeline "
                f"there first (pipe.to({'cuda' if cuda else 'cpu'!r})), or choose other devices"
            )


def check_one_latents(call: Call) -> None:
    """Raise InputError for latents in a list, for what serves one tensor of them only."""
    names = [call.signature.inputs[i].name for i in call.indices(Role.LATENTS)]
    several = [name for name in names if name.split(".")[0] not in RESIDUALS]
    if len(several) > 1:
        raise InputError(
            f"this denoiser takes its latents as a list ({', '.join(several)}), which waves, "
            "pipelines and guidance split do not serve: take schedule='asyncdiff', "
            "guidance='batched' and warmup_mode='chain'"
        )


def argument_names(
    module: nn.Module, latents: str | None = None, timestep: str | None = None
) -> tuple[str, str | None]:
    """The names under which a denoiser takes its latents and, if it does, its timestep."""
    names = list(inspect.signature(module.forward).parameters)
    found = latents or next((n for n in LATENTS if n in names), None)
    if found is None:
        if not names:
            raise InputError(f"{type(module).__name__}.forward has no arguments for latents")
        found = names[0]
    others = [n for n in names if n != found]
    time = timestep or next((n for n in TIMESTEP if n in others), None)
    return found, time


def _bind(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as e:
        raise InputError(f"{type(module).__name__} cannot be called like this: {e}") from e
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise CaptureError(
                f"{type(module).__name__}.forward takes *{name}: wrap it in a module whose "
                "forward names its arguments"
            )
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(value)
        else:
            arguments[name] = value
    return arguments


def _key(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _choose(
    what: str, wanted: str | None, known: Sequence[str], names: Sequence[str], position: int
) -> str | None:
    if wanted is not None:
        if wanted not in names:
            raise InputError(f"{what}={wanted!r} is not a tensor argument; there are {names}")
        return wanted
    for name in known:
        if name in names:
            return name
    if len(names) > position:
        return names[position]
    if what == "latents":
        raise InputError("the denoiser was called without any tensor: pass its latents")
    return None


def _alike(name: str | None, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Where the latents are a list, a picture each: its further entries."""
    if name is None or not name.rpartition(".")[2].isdecimal():
        return []
    prefix, first = name.rpartition(".")[0], tensors[name]
    return [
        n
        for n, t in tensors.items()
        if n.rpartition(".")[0] == prefix
        and n.rpartition(".")[2].isdecimal()
        and (t.shape, t.dtype) == (first.shape, first.dtype)
    ]


def _hashable(name: str, leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError as e:
        raise InputError(
            f"argument {name} is a {type(leaf).__name__}, which cannot be captured: "
            "pass tensors, numbers, strings, or dicts, lists and tuples of them"
        ) from e
    return leaf
