"""Settings chosen for each generation of a denoiser, by what its caller asks for."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from ..config import ParallelConfig
from ..denoiser import AsyncDenoiser
from ..errors import BatchError, MemoryLimitError, TokensError
from ..graph.signature import Call, Role, Signature, has_several_latents, is_mixed
from ..partition.memory import of_module
from ..quality import AUTO, Picked, Task, pick
from ..runtime.pipelined import conditions_of
from ..sampling.clean_image import CleanImage

log = logging.getLogger("asyncdiff")

#: The share of what is free on a GPU that weights may take where each device has all of them: the
#: rest is for what runs need, which nobody knows before the denoiser is exported.
_ROOM = 0.75
#: The share of parameters that linear layers have in a transformer.
_LINEAR = 0.95
#: Bytes a millisecond of a link over which keys and values take less than what they save: each of
#: two H200s gives 28 MB of them in a block of FLUX at 1024², and saves 1 ms.
_FAST = 1e8
#: So many numbers of one condition's latents, from which on half of a step's work takes a device
#: hardly more than half the time, by what was measured (docs/guide/quality.md): those of SD3 and
#: FLUX at 1024², and of AnimateDiff's 16 frames at 512², have as many; of SDXL a quarter.
_LARGE = 2**18


class AutoSettings:
    """Picks a denoiser's settings when a generation begins. What the ranks hold is made anew only
    where it has to be. ``devices`` are those that there are, in all processes; ``own`` the numbers
    of this one's. ``later``: denoisers that will be there, too, and get their ranks after this one.
    """

    def __init__(
        self,
        quality: str,
        devices: list[torch.device],
        base: ParallelConfig,
        own: Sequence[int],
        later: Sequence[AsyncDenoiser] = (),
    ) -> None:
        self.quality = quality
        self._devices = devices
        self._own, self._later = own, later
        self._base = base
        #: what was picked last
        self.picked: Picked | None = None
        #: settings that were given by hand since
        self._by_hand: dict[str, Any] = {}
        #: calls whose batch cannot be taken apart, and those whose tokens cannot
        self._together: set[Signature] = set()
        self._no_tokens: set[Signature] = set()
        #: calls for which not each device has room for the whole denoiser
        self._no_room: set[Signature] = set()
        #: the call that settings were picked for last
        self._settled: Signature | None = None
        #: bytes that are free for it on each of ``own``, once that was looked at
        self._free: list[int | None] | None = None
        #: whether links are fast enough for tokens, once that was looked at
        self._fast: bool | None = None

    def given(self, config: ParallelConfig, changes: dict[str, Any]) -> dict[str, Any]:
        """These are not picked any more; those of them that ``config`` takes at once. Raises what
        :meth:`asyncdiff.ParallelConfig.between_generations` does, of waves."""
        waves = replace(self._base, components=2, schedule="wavefront")
        waves.between_generations(self._by_hand | changes)
        self._by_hand |= changes
        return changes if config.schedule == "wavefront" else {}

    def picks_again(self, call: Call, error: BatchError | TokensError | MemoryLimitError) -> bool:
        """Whether calls like this are to be made once more, with other settings: the batch, or the
        tokens, cannot be taken apart, or there is no room for what was picked, as cutting has found
        out before anything was computed. In a group all processes have the same error."""
        if isinstance(error, MemoryLimitError):
            again = self._has_no_room(call)
        else:  # whose parts have to be kept together
            tokens = isinstance(error, TokensError)
            again = self._is_new(call, self._no_tokens if tokens else self._together)
        if again:
            log.warning("settings are picked once more: %s", error)
        return again

    def _has_no_room(self, call: Call) -> bool:
        """Note what was picked as what has no room; whether that is new, and not what was asked
        for by hand."""
        picked = {} if self.picked is None else self.picked.settings
        chosen = {n: x for n, x in picked.items() if n not in self._by_hand}
        mode = chosen.get("exact_mode")
        if chosen.get("components") == 1 or "sequence" in chosen.values() or mode == "split":
            return self._is_new(call, self._no_room)
        if "split" in chosen.values() or "pipeline" in chosen.values():
            return self._is_new(call, self._together)
        return False

    def _is_new(self, call: Call, known: set[Signature]) -> bool:
        """Whether calls like this, or those that settings were picked for, which may be of another
        branch, are not among these yet; from now on they are."""
        found = {call.signature, self._settled or call.signature}
        new = not found <= known
        known |= found
        return new

    def __str__(self) -> str:
        return f"quality={self.quality!r}"

    def settle(
        self,
        denoiser: AsyncDenoiser,
        call: Call,
        steps: int,
        clean: CleanImage | str,
        calls: int = 1,
    ) -> None:
        """Have ``denoiser`` take the settings for a generation that begins with this call.
        ``clean``: the clean images of its steps, or why waves do not serve them. ``calls``: in a
        step, a condition each."""
        self._settled = call.signature
        task = self._task(denoiser, call, steps, clean, calls)
        self._agree(denoiser, task)
        self._settle(denoiser, task)

    def _settle(self, denoiser: AsyncDenoiser, task: Task) -> None:
        """Have ``denoiser`` take the settings for this task."""
        prepared = None if self.picked is None else self.picked.settings
        picked = pick(self.quality, task, prepared, self._by_hand)
        devices = tuple(self._devices[: picked.devices])
        self._took(picked)
        denoiser.adopt(replace(self._base, devices=devices, **picked.settings))

    def _agree(self, denoiser: AsyncDenoiser, task: Task) -> None:
        # What is picked decides about what the processes do together next.
        known = dataclasses.asdict(task)
        denoiser.team.agree(
            "choose settings",
            lambda: {f"what is asked for ({n})": repr(v) for n, v in known.items()},
        )

    def _took(self, picked: Picked) -> None:
        if picked != self.picked:
            log.info("%s picks %s", self, picked)
            self.picked = picked

    def _task(
        self, denoiser: AsyncDenoiser, call: Call, steps: int, clean: CleanImage | str, calls: int
    ) -> Task:
        latents = call.tensors[call.indices(Role.LATENTS)[0]]
        conditions = conditions_of(latents)
        several = has_several_latents(call)
        whole = denoiser.holds_all
        apart = call.signature not in self._together and not several and whole
        if several:
            clean = "the denoiser has several latents, which waves do not serve"
        elif is_mixed(call.tensors[call.indices(Role.TIMESTEP)[0]]):
            clean = "parts of the denoiser's input have times of their own"
        room = denoiser.team.every(
            "choose settings", lambda: whole and self._has_room(denoiser, call)
        )
        tokens = room and call.signature not in self._no_tokens and not several
        return Task(
            devices=len(self._devices),
            steps=steps,
            step=clean if isinstance(clean, str) else _length(clean),
            guided=apart and (calls if calls > 1 else conditions) == 2,
            pictures=latents.shape[0] // conditions if apart else 1,
            whole=room,
            tokens=tokens and self._serves_tokens(denoiser),
            large=latents.numel() // conditions >= _LARGE,
            remembered=_remembered(clean),
        )

    def _has_room(self, denoiser: AsyncDenoiser, call: Call) -> bool:
        """Whether each device may hold the whole denoiser: its weights in what the user allows,
        else in a share of what was free before the first generation; and what cutting counts, as
        far as that is known."""
        said = [self._base.memory_of(rank) for rank in range(len(self._devices))]
        if self._free is None:
            self._free = [
                None if said[rank] else denoiser.room_on(self._devices[rank], self._later)
                for rank in self._own
            ]
        size = of_module(denoiser.module)
        beside = sum(of_module(other.module) for other in self._later)
        return (
            call.signature not in self._no_room
            and all(limit is None or size <= limit for limit in said)
            and all(room is None or size + beside <= _ROOM * room for room in self._free)
        )

    def _serves_tokens(self, denoiser: AsyncDenoiser) -> bool:
        """Whether this looks like a denoiser whose tokens can be shared out, over links on which
        that is faster than a device by itself."""
        if self._fast is None:
            # On CPUs ranks emulate others.
            links = self._devices[0].type != "cuda" or denoiser.link_speed() >= _FAST
            self._fast = links and is_transformer(denoiser.module)
        return self._fast


class AutoExactMode(AutoSettings):
    """Picks how exact steps run, under settings that were given by hand, with ``exact_mode="auto"``
    among them."""

    def __str__(self) -> str:
        return 'exact_mode="auto"'

    def given(self, config: ParallelConfig, changes: dict[str, Any]) -> dict[str, Any]:
        """What ``config`` takes of these at once; an ``exact_mode`` among them is not picked any
        more, or from now on."""
        now = {"exact_mode": AUTO} | self._by_hand | changes
        config.between_generations(now)
        self._by_hand = {} if now["exact_mode"] == AUTO else {"exact_mode": now["exact_mode"]}
        return {n: x for n, x in changes.items() if x != AUTO or n != "exact_mode"}

    def _settle(self, denoiser: AsyncDenoiser, task: Task) -> None:
        """Have ``denoiser`` run exact steps as this task is fastest."""
        if self._by_hand:
            return
        picked = exact_mode(task, denoiser.config)
        self._took(picked)
        denoiser.configure(**picked.settings)


def exact_mode(task: Task, config: ParallelConfig) -> Picked:
    """How exact steps are fastest under these settings."""
    ranks, mode = config.ranks, "chain"
    alone = not task.guided or config.guidance == "split"
    if config.schedule in ("pipeline", "sequence") or config.auto_warmup is not None:
        why = "the other settings go with nothing else"
    elif task.tokens and ranks > 1 and (alone or ranks > 2):
        mode, why = "sequence", "in exact steps devices share out the picture's tokens"
    elif task.guided and task.whole and ranks > 1 and not alone:
        mode, why = "split", "exact steps run a condition on each of two devices"
    elif not task.whole:
        why = "not each device has room for the whole denoiser"
    else:
        why = "there are no parts that devices could share out"
    return Picked({"exact_mode": mode}, task.devices, why)


def is_transformer(module: nn.Module) -> bool:
    """Whether nearly all of a denoiser's parameters are those of linear layers: in a UNet a good
    part is convolutions, through which tokens are not followed."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    linear = sum(p.numel() for m in layers for p in m.parameters(recurse=False))
    return linear >= _LINEAR * sum(p.numel() for p in module.parameters()) > 0


def _remembered(clean: CleanImage | str) -> int:
    if isinstance(clean, str) or clean.response is None:
        return 0
    return clean.response.remembered


def _length(clean: CleanImage) -> float:
    """The median length of steps in log-SNR."""
    gaps = [abs(b - a) for a, b in itertools.pairwise(clean.log_snr)]
    return median(gaps) if gaps else 0.0
