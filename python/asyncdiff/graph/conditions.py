"""Which inputs of a call hold all parts of its batch, found out by running the denoiser.

The batch, along the first dimension of the latents, is cut into parts: the conditions of
classifier-free guidance, which lie one after the other, or pictures. So is all else that there is
of each sample. Shapes alone do not tell what that is: the size of a picture, [64, 96], is as long
as a batch of two. So the denoiser is run with these inputs changed but for one part: what it
returns for that part has to stay the same, bit for bit. An input for which it does not is shared by
all, if the others are then found to be apart; and each part run by itself has to give what it gives
in the batch. Otherwise the denoiser is refused: nothing that was not found to be exact is split.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import BatchError
from .batch import BatchSplit
from .side_effects import SideEffects
from .signature import Call, Role
from .writes import bits


@dataclass(frozen=True)
class Purpose:
    """What a batch is cut for, in words of error messages: ``gives`` parts to ranks, ``parts`` and
    one ``part`` of the batch, and what to do ``instead``."""

    gives: str
    parts: str
    part: str
    instead: str


GUIDANCE = Purpose(
    "guidance='split' and exact_mode='split' give to different ranks",
    "conditions",
    "condition",
    "take guidance='batched' and exact_mode='chain'",
)
PICTURES = Purpose(
    "schedule='pipeline' gives to ranks in turn",
    "pictures",
    "picture",
    "take schedule='asyncdiff' or 'wavefront'",
)
#: A rounding step of TF32, in which GPUs may compute float32.
_TF32 = 2.0**-10


def batched_inputs(
    module: nn.Module, call: Call, split: BatchSplit, purpose: Purpose = GUIDANCE
) -> list[bool]:
    """Which tensors of a call hold all parts of ``split`` along their first dimension.

    Runs the denoiser five times or more, where the call's latents are; weights that lie elsewhere
    are brought there one by one. Raises BatchError where the batch does not hold so many
    conditions, or the denoiser does not keep the parts apart.
    """
    if purpose is GUIDANCE:
        processors = {type(getattr(m, "processor", None)).__name__ for m in module.modules()}
        # They take conditions apart themselves, which may look like what is done to each of them.
        mixing = sorted(name for name in processors if "PAG" in name)
        if mixing:
            raise BatchError(
                f"{mixing[0]} mixes the parts of the batch, which {purpose.gives}: "
                f"{purpose.instead}"
            )
    batched = _by_shape(call, split)
    effects = SideEffects(module)
    try:
        _Trial(module, call, split, purpose).refine(batched)
    finally:
        effects.undo()
    return batched


def _by_shape(call: Call, split: BatchSplit) -> list[bool]:
    """Which tensors have a first dimension like that of the latents."""
    index = call.indices(Role.LATENTS)[0]
    shape = call.signature.inputs[index].shape
    batch = shape[0] if shape else 0
    parts = split.conditions * split.count
    if batch < parts or batch % parts:
        raise BatchError(
            "guidance='split' and exact_mode='split' give each of two conditions ranks of its "
            f"own, but this call has a batch of {batch}: pass guidance_scale > 1 to the pipeline "
            f"(where it guides by a batch of two conditions), or {GUIDANCE.instead}"
        )
    # Denoisers of videos take some conditioning once a frame.
    sizes = {batch, *(batch * frames for frames in shape[1:3] if len(shape) == 5)}
    return [bool(x.shape) and x.shape[0] in sizes for x in call.signature.inputs]


class _Trial:
    """A denoiser run on variants of one call."""

    def __init__(self, module: nn.Module, call: Call, split: BatchSplit, purpose: Purpose) -> None:
        self._module, self._call, self._split = module, call, split
        self._purpose = purpose
        self._latents = call.indices(Role.LATENTS)
        self._device = call.tensors[self._latents[0]].device
        weights = itertools.chain(module.parameters(), module.buffers())
        apart = any(w.device.type != self._device.type for w in weights)
        self._together = _Together(self._device) if apart else contextlib.nullcontext()
        self._whole = self._run(call.tensors)
        rows = split.conditions * split.count
        if any(not x.dim() or x.shape[0] % rows for x in self._whole):
            raise BatchError(
                "the denoiser returns something that is not there for each sample of the batch, "
                f"so that {purpose.parts} cannot be given to ranks of their own: {purpose.instead}"
            )

    def refine(self, batched: list[bool]) -> None:
        """Take out of ``batched`` what is not; raises BatchError where the rest is not apart."""
        chosen = [i for i, yes in enumerate(batched) if yes]
        if not self._apart(chosen):
            shared = [i for i in chosen if not self._apart([i])]
            for i in shared:
                batched[i] = False
            chosen = [i for i in chosen if i not in shared]
            if not set(self._latents) & set(chosen) or not self._apart(chosen):
                raise BatchError(
                    f"the denoiser mixes the {self._purpose.parts} of the batch, which "
                    f"{self._purpose.gives}: {self._purpose.instead}"
                )
        part, instead = self._purpose.part, self._purpose.instead
        pieces = [
            self._split.parts(t) if i in chosen else [t] * self._split.count
            for i, t in enumerate(self._call.tensors)
        ]
        try:
            alone = [self._run(values) for values in zip(*pieces, strict=True)]
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            raise BatchError(
                f"the denoiser cannot be run on one {part} of the batch alone, which "
                f"{self._purpose.gives} ({type(e).__name__}: {e}): {instead}"
            ) from e
        for leaves, whole in zip(zip(*alone, strict=True), self._whole, strict=True):
            if not self._alike(list(leaves), whole):
                raise BatchError(
                    f"the denoiser gives other results for one {part} of the batch alone, which "
                    f"{self._purpose.gives}: {instead}"
                )

    def _apart(self, chosen: Collection[int]) -> bool:
        """Whether no part of the result depends on the other parts of the chosen inputs, but for
        what two runs on the same inputs differ by."""
        for g in range(self._split.count):
            tensors = [
                self._changed(t, g) if i in chosen else t for i, t in enumerate(self._call.tensors)
            ]
            for i, pair in enumerate(zip(self._run(tensors), self._whole, strict=True)):
                a, b = (self._split.part(x, g) for x in pair)
                if not torch.equal(bits(a), bits(b)) and _distance(a, b) > 2 * self._noise[i]:
                    return False
        return True

    @functools.cached_property
    def _noise(self) -> list[torch.Tensor]:
        again = self._run(self._call.tensors)
        return [_distance(a, b) for a, b in zip(again, self._whole, strict=True)]

    def _changed(self, tensor: torch.Tensor, part: int) -> torch.Tensor:
        """``tensor`` with other values in all parts but one. It lies in memory as the tensor does:
        kernels for another layout round otherwise."""
        pieces = enumerate(self._split.parts(tensor))
        changed = self._split.join([x if g == part else _others(x) for g, x in pieces])
        return torch.empty_like(tensor).copy_(changed)

    def _alike(self, leaves: list[torch.Tensor], whole: torch.Tensor) -> bool:
        """Whether the parts' results are those in the batch, but for rounding."""
        joined = self._split.join(leaves)
        if joined.shape != whole.shape:
            return False
        dtypes = {whole.dtype, *(self._call.tensors[i].dtype for i in self._latents)}
        steps = [torch.finfo(d).eps for d in dtypes if d.is_floating_point]
        if not steps:
            return torch.equal(joined, whole)
        step = max(*steps, _TF32 if whole.is_cuda and whole.dtype != torch.float64 else 0.0)
        known = joined.isfinite() & whole.isfinite()
        a, b = (torch.where(known, x, 0).double() for x in (joined, whole))
        # Kernels are others for another batch, but what they make of it is half of the digits.
        return bool((a - b).square().mean().sqrt() <= step**0.5 * b.square().mean().sqrt())

    def _run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors among what the denoiser returns."""
        cuda = [self._device] if self._device.type == "cuda" else []
        # The user's random numbers stay what they are.
        with torch.random.fork_rng(cuda), torch.no_grad(), self._together:
            result = self._module(**self._call.kwargs(tensors))
        return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


class _Together(TorchDispatchMode):
    """Brings tensors of the host to a device wherever an operation has some of both: weights that
    wait on the host are there as long as they are used, one by one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _ACROSS:
            given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            if {x.device.type for x in given if x.dim()} == {"cpu", self._device.type}:
                args, kwargs = pytree.tree_map_only(
                    torch.Tensor,
                    lambda x: x.to(self._device) if x.device.type == "cpu" else x,
                    (args, kwargs),
                )
        return func(*args, **kwargs)


#: Operations that are between devices.
_ACROSS = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


def _others(x: torch.Tensor) -> torch.Tensor:
    """Other values that are as valid, as indices too: smaller ones of the same sign, none of them
    what it was."""
    if x.dtype == torch.bool:
        return ~x
    if x.is_floating_point() or x.is_complex():
        return torch.where(x == 0, 0.5, x / 2).to(x.dtype)
    return torch.where(x > 0, x - 1, x + 1).to(x.dtype)


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The largest difference; infinite where only one of two values is a number."""
    a, b = a.double(), b.double()
    far = torch.where(a.isfinite() == b.isfinite(), (a - b).abs().nan_to_num(0.0, 0.0), torch.inf)
    return far.max()
