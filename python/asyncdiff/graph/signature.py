"""The call of a denoiser, taken apart: named tensors with a role, and constants.

A denoiser's arguments become flat, named leaves in the order of its signature, so that the rest of
the package never needs to know what a particular model's ``forward`` looks like.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InputError
from .layers.containers import register_containers

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
    "control",  # ComfyUI's name
)


#: What an argument ends with that scales the results of adapters: a number that users move from
#: picture to picture. It is an input, but for 0 and 1, at which denoisers leave something out.
_SCALES = "attention_kwargs.scale"


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
    """One call of the denoiser: ``tensors`` in the order of ``signature.inputs``.

    ``leaves`` are its arguments, flat, with the class ``torch.Tensor`` wherever a tensor stands,
    and ``float`` where one stands for a number; ``names`` are theirs, dotted, ``spec`` puts them
    together.
    """

    signature: Signature
    tensors: tuple[torch.Tensor, ...]
    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    spec: pytree.TreeSpec

    def kwargs(
        self, tensors: Sequence[torch.Tensor] | None = None, number: Callable[[Any], Any] = float
    ) -> dict[str, Any]:
        """The call's arguments, by keyword; with other ``tensors`` in the place of its own.
        ``number``: makes a number of the tensor that stands for it."""
        values = iter(self.tensors if tensors is None else tensors)
        make: dict[Any, Callable[[Any], Any]] = {torch.Tensor: lambda x: x, float: number}
        leaves = [make[x](next(values)) if is_input(x) else x for x in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)

    def replacing(self, index: int, tensor: torch.Tensor) -> Call:
        """The same call with another tensor, of the same shape and dtype, at ``tensors[index]``."""
        tensors = (*self.tensors[:index], tensor, *self.tensors[index + 1 :])
        return replace(self, tensors=tensors)

    def indices(self, role: Role) -> tuple[int, ...]:
        """Positions in ``tensors`` of the inputs with this role."""
        return self.signature.places[role]


def difference(old: Signature, new: Signature) -> str:
    """What is other in a call, in words."""
    before = {x.name: (x.shape, x.dtype) for x in old.inputs}
    for x in new.inputs:
        was = before.get(x.name)
        if was != (x.shape, x.dtype):
            then = f"{was[0]} {was[1]}" if was else "not a tensor"
            return f"{x.name} was {then}, is {x.shape} {x.dtype}"
    options = dict(old.constants)
    changed = [n for n, v in new.constants if n not in options or options[n] != v]
    return f"option {changed[0]} changed" if changed else "other arguments are given"


def is_input(leaf: Any) -> bool:
    """Whether one of :attr:`Call.leaves` stands for a tensor."""
    return leaf is torch.Tensor or leaf is float


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
    return Parser(module, latents, timestep)(args, kwargs)


class Parser:
    """Takes calls of one module apart, quickly where they are like the one before.

    ``latents`` and ``timestep``: see :func:`parse`.
    """

    def __init__(
        self, module: nn.Module, latents: str | None = None, timestep: str | None = None
    ) -> None:
        self._module = module
        self._latents, self._timestep = latents, timestep
        #: the arguments of the call before: their tree, shape and dtype of tensors, all else as it
        #: is; that call, without its tensors; and where among the arguments these stood
        self._last: tuple[Any, Call, list[int]] | None = None
        #: numbers by name, and the tensors that stand for them, which are known again
        self._numbers: dict[str, tuple[float, torch.Tensor]] = {}

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The call ``module(*args, **kwargs)``; raises what :func:`parse` does."""
        given, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        each = [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else (type(x), x) for x in given]
        last = self._last
        if last is None or (spec, each) != last[0]:
            if register_containers(given):
                return self(args, kwargs)
            self._last = last = ((spec, each), *self._parse(given, spec))
        _, call, places = last
        inputs = zip(places, call.signature.inputs, strict=True)
        tensors = tuple(
            [
                x if isinstance(x := given[place], torch.Tensor) else self._of_number(x, which)
                for place, which in inputs
            ]
        )
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise InputError(
                "an input of the denoiser asks for its gradient, which ranks do not compute: call "
                "it under torch.no_grad(), or take gradients without asyncdiff (restore())"
            )
        return replace(call, tensors=tensors)

    def _of_number(self, given: Any, which: Input) -> torch.Tensor:
        """A tensor for a number (the timestep, a scale), which would be frozen into the exported
        graph."""
        if which.role is Role.TIMESTEP:
            return torch.tensor(given)
        if which.name not in self._numbers or self._numbers[which.name][0] != given:
            self._numbers[which.name] = given, torch.tensor(given, dtype=which.dtype)
        return self._numbers[which.name][1]

    def _parse(self, given: list[Any], spec: pytree.TreeSpec) -> tuple[Call, list[int]]:
        """A call without its tensors, and where these are among the arguments ``given``."""
        args, kwargs = pytree.tree_unflatten(list(range(len(given))), spec)
        pairs, tree = pytree.tree_flatten_with_path(_bind(self._module, args, kwargs))
        places = {".".join(_key(k) for k in path): place for path, place in pairs}
        leaves = {name: given[place] for name, place in places.items()}
        time = self._timestep or next((n for n in TIMESTEP if n in leaves), "")
        number = leaves.get(time)
        if _is_number(number):
            leaves[time] = torch.tensor(number)
        moved = [
            n
            for n, x in leaves.items()
            if n.endswith(_SCALES) and _is_number(x) and x not in (0, 1)
        ]
        leaves |= {n: torch.tensor(leaves[n], dtype=torch.float64) for n in moved}
        tensors = {n: x for n, x in leaves.items() if isinstance(x, torch.Tensor)}
        latents = _choose("latents", self._latents, LATENTS, list(tensors), 0)
        timestep = _choose("timestep", self._timestep, TIMESTEP, list(tensors), 1)
        moving = _alike(latents, {n: x for n, x in tensors.items() if n != timestep})
        roles: dict[Any, Role] = {timestep: Role.TIMESTEP} | dict.fromkeys(
            (n for n in tensors if n in moving or n.split(".")[0] in RESIDUALS), Role.LATENTS
        )
        signature = Signature(
            tuple(
                Input(n, roles.get(n, Role.CONDITIONING), tuple(x.shape), x.dtype)
                for n, x in tensors.items()
            ),
            tuple((n, _hashable(n, x)) for n, x in leaves.items() if n not in tensors),
            str(tree),
        )
        marks = dict.fromkeys(tensors, torch.Tensor) | dict.fromkeys(moved, float)
        template = tuple(marks.get(n, x) for n, x in leaves.items())
        call = Call(signature, (), template, tuple(leaves), tree)
        return call, [places[n] for n in tensors]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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


def _latents_names(call: Call) -> list[str]:
    names = [call.signature.inputs[i].name for i in call.indices(Role.LATENTS)]
    return [name for name in names if name.split(".")[0] not in RESIDUALS]


def has_several_latents(call: Call) -> bool:
    """Whether latents come in a list."""
    return len(_latents_names(call)) > 1


def is_mixed(timestep: torch.Tensor) -> bool:
    """Whether a call has several timesteps at once, for the parts of its input. A host that asks a
    GPU waits for it."""
    return timestep.numel() > 1 and not bool((timestep == timestep.reshape(-1)[0]).all())


def check_one_latents(call: Call) -> None:
    """Raise InputError for latents in a list, for what serves one tensor of them only."""
    several = _latents_names(call)
    if len(several) > 1:
        raise InputError(
            f"this denoiser takes its latents as a list ({', '.join(several)}), which waves, "
            "pipelines, shared tokens and guidance split do not serve: take schedule='asyncdiff', "
            "guidance='batched' and exact_mode='chain'"
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
    if not names:
        raise InputError("the denoiser was called without any tensor: pass its latents")
    other = names[position] if len(names) > position else None
    return next((name for name in known if name in names), other)


def _alike(latents: str | None, tensors: Mapping[str, torch.Tensor]) -> set[str | None]:
    """The latents and, where they are a list, a picture each, its further entries."""

    def entry(name: str) -> Any:
        root, _, number = name.rpartition(".")
        return number.isdecimal() and (root, tensors[name].shape, tensors[name].dtype)

    first = latents in tensors and entry(str(latents))
    return {latents, *(n for n in tensors if first and entry(n) == first)}


def _hashable(name: str, leaf: Any) -> Any:
    try:
        hash(leaf)
    except TypeError as e:
        raise InputError(
            f"argument {name} is a {type(leaf).__name__}, which cannot be captured: "
            "pass tensors, numbers, strings, or dicts, lists and tuples of them"
        ) from e
    return leaf
