"""The one configuration: how a denoiser is spread over ranks."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .deadline import check_deadline
from .errors import InputError, PlanError
from .partition.memory import read_memory
from .partition.ownership import Split
from .partition.speeds import read_speeds
from .progress import Progress
from .sampling.auto_warmup import AutoWarmup
from .sampling.calibration import Calibration
from .sampling.predictor import check_order
from .schedule.plan import EXACT, check_delay, check_numbers, check_schedule, rank_count

#: One entry a rank, or None: all GPUs, else the CPU.
Devices = Sequence[str | int | torch.device] | None
#: With guidance split, guidance has two conditions: two groups of ranks.
GROUPS = 2
#: What ``compress`` may be.
COMPRESS = ("fp8", "int8", "auto")
#: Parts of a denoiser, where nothing else is said.
COMPONENTS = 2
#: More steps than any generation has, where their number is not known yet.
_MANY = 1_000_000


@dataclass(frozen=True)
class ParallelConfig:
    """Settings of a parallelised denoiser. Immutable, and checked when made.

    Attributes:
        devices: one entry a rank (N + S − 1; N in all schedules but the published one; twice that
            with guidance="split"), which may repeat (``["cuda:0", "cuda:1"]``, ``["cpu"] * 3``);
            None for all GPUs, else the CPU.
        components: N, the parts that the denoiser is split into. With schedule="sequence" and the
            devices given by keyword, left out: all of these, half of them for each condition with
            guidance="split".
        stride: S, the sampler steps that one parallel batch serves.
        warmup: w ≥ 1, the first steps, run exactly; w = all steps gives the sequential result.
            "auto", or an :class:`asyncdiff.AutoWarmup`: exact steps end when the denoiser's output
            changes less from step to step than it did.
        split: ``"auto"`` (node costs measured on the first device; where every component has a GPU
            of its own they are then timed, and cut again if that makes the slowest faster),
            ``"estimate"`` (from FLOPs and bytes, the same on every machine), one list of module
            paths for each component, or the ``partition.cuts`` of an earlier run.
        speeds: how fast the ranks' devices are, in any unit, one entry a rank (further ones are for
            devices that are not used): components are cut for that, and tokens shared out. None:
            equal devices count as equally fast, until their components are timed; of unequal GPUs
            each kind is measured.
        memory: what each rank's component may take of its device: bytes, or ``"10GB"`` (10⁹) or
            ``"9.5GiB"``, for all ranks or a list with an entry for each (further ones are for
            devices that are not used). The cut is the fastest within that, by what is estimated
            (docs/guide/memory.md). None: what is free on GPUs.
        time_shift: of ``"asyncdiff"`` only: pass the timestep one index earlier in asynchronous
            steps.
        schedule: ``"asyncdiff"``, as published (Chen et al., NeurIPS 2024); ``"wavefront"``: an
            evaluation passes through the components in successive ticks, and the sampler goes on
            with an extrapolated clean image until it arrives (docs/guide/waves.md), closer to the
            sequential result, at the same speed; ``"pipeline"``, for batches of at least N
            pictures: components work on different pictures in turn, and every step is exact
            (docs/guide/pipeline.md); or ``"sequence"``, for transformers: N ranks hold all of the
            denoiser, share out its tokens and exchange keys and values, and every step is exact
            (docs/guide/sequence.md).
        delay: of waves only: ticks until a wave's prediction arrives, from 1 to N − 1; with N − 1,
            which None means, nothing inside a wave is stale.
        order: of waves only: how far the clean image is extrapolated, from 0 (held) to 1 (in a
            straight line); None for what measured best for N and S; or what ``calibrate()`` or
            ``Calibration.load`` returned.
        exact_tail: the last so many steps are run exactly, like the first w. Of waves, they pay
            back all that late predictions have misled the sampler by.
        extrapolate: of ``"asyncdiff"`` only: by how much of their last change (0 to 2) the values
            of other components are moved on before they are used.
        guidance: "batched" (every rank takes both conditions of a guided batch), or "split": the
            first half of the ranks takes the first condition, the others the second one.
        exact_mode: "chain" (exact steps run one component after another); "split": the exact
            steps but the last of the first ones run whole on two devices, a condition each; or
            "sequence": they run on all ranks, which share out the tokens. Those devices hold the
            whole denoiser then. "auto", of pipelines: what is fastest of these for each generation,
            where there is room for it.
        latents, timestep: names of those arguments, where they are not the usual ones.
        compile: compile the components with inductor, which takes a minute or so for inputs of a
            new shape, up to four where components turn out unequal (results are cached on the disk,
            where torch keeps them) and makes a step a third faster; None for denoisers of at least
            100 million parameters on GPUs. "regions": modules that the denoiser has several times
            (blocks) are compiled by themselves, once for all of them, which True is; "whole": each
            component is compiled as one, but for what is pushed.
        compress: in asynchronous steps a byte a value crosses between components, by how much it
            differs from what was to be expected (docs/guide/links.md): "fp8", "int8"; "auto":
            "fp8" where a boundary would outlast its computation by more than compressing it costs;
            None: all crosses as it is. What exact steps send is never compressed.
        progress: called with (what, done, of how many) during preparation; None for a bar where
            stderr is a terminal.
        deadline: seconds after which a rank that waits for another gives up; None takes
            ``ASYNCDIFF_DEADLINE``, else 10.

    Raises PlanError or InputError, each saying what to change.
    """

    devices: Devices = None
    components: int = COMPONENTS
    stride: int = 1
    warmup: int | str | AutoWarmup = 1
    split: Split = "auto"
    speeds: Sequence[float] | None = None
    memory: int | str | Sequence[int | str | None] | None = None
    time_shift: bool = False
    schedule: str = "asyncdiff"
    delay: int | None = None
    order: float | Calibration | None = None
    exact_tail: int = 0
    extrapolate: float = 0.0
    guidance: str = "batched"
    exact_mode: str = "chain"
    latents: str | None = None
    timestep: str | None = None
    compile: bool | str | None = None
    compress: str | None = None
    progress: Progress | None = dataclasses.field(default=None, compare=False)
    deadline: float | None = None

    def __post_init__(self) -> None:
        check_schedule(
            self.schedule,
            stride=self.stride,
            time_shift=self.time_shift,
            extrapolate=self.extrapolate,
            exact_tail=self.exact_tail,
        )
        check_numbers(self.components, self.stride, self.exact_steps(_MANY))
        check_delay(self.delay, self.schedule, self.components)
        check_order(self.order, self.schedule)
        object.__setattr__(self, "speeds", read_speeds(self.speeds))
        object.__setattr__(self, "memory", read_memory(self.memory))
        self._check_modes()
        check_deadline(self.deadline)
        if self.progress is not None and not callable(self.progress):
            raise InputError(
                f"progress={self.progress!r}: pass a function (what, done, of how many)"
            )

    def _check_modes(self) -> None:
        for name, words in (
            ("guidance", ("batched", "split")),
            ("exact_mode", ("chain", "split", "sequence", "auto")),
        ):
            if getattr(self, name) not in words:
                said = " or ".join(map(repr, words))
                raise InputError(f"{name}={getattr(self, name)!r}: write {said}")
        if self.compress not in (None, *COMPRESS):
            said = ", ".join(map(repr, COMPRESS))
            raise InputError(f"compress={self.compress!r}: write {said}, or None")
        if self.compile not in (None, True, False, "whole", "regions"):
            raise InputError(f"compile={self.compile!r}: write 'regions', 'whole', True or False")
        alike = self.exact_mode in ("chain", "auto")
        if self.schedule == "pipeline" and (self.splits or not alike):
            raise PlanError(
                "schedule='pipeline' keeps the conditions of a picture together: take "
                "guidance='batched' and exact_mode='chain', and more components for more devices"
            )
        if self.schedule == "sequence" and not alike:
            raise PlanError(
                f"exact_mode={self.exact_mode!r} does not go with schedule='sequence', in which "
                "every step is exact and runs alike: leave it out"
            )
        if not alike and self.auto_warmup is not None:
            raise PlanError(
                "warmup='auto' needs exact_mode='chain': the last exact step, which fills the "
                "mailboxes, is not known ahead"
            )
        if self.exact_mode == "split" and self.guidance == "batched" and self.ranks < GROUPS:
            raise PlanError(
                "exact_mode='split' needs two ranks: take components >= 2 or stride >= 2, or "
                "exact_mode='chain'"
            )

    @classmethod
    def of(
        cls, config: ParallelConfig | None, settings: Mapping[str, Any], group: Any = None
    ) -> ParallelConfig:
        """``config`` with ``settings``, by name, in place of its own; where none was given, with as
        many components as devices that share out tokens, unless others are in other processes of
        ``group``. Raises InputError for a name that there is not."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
                raise InputError(f"there is no setting {name}: {hint}")
        devices = settings.get("devices")
        if (
            config is None
            and group is None
            and settings.get("schedule") == "sequence"
            and isinstance(devices, (list, tuple))
        ):
            groups = GROUPS if settings.get("guidance") == "split" else 1
            settings = {"components": max(len(devices) // groups, 1), **settings}
        return dataclasses.replace(config or cls(), **settings)

    def between_generations(self, changes: Mapping[str, Any]) -> ParallelConfig:
        """The same with what may change between generations: see :data:`CHANGEABLE`.

        Raises InputError for any other setting, PlanError for values that no plan has.
        """
        known = self.__dataclass_fields__
        fixed = [name for name in changes if name in known and name not in CHANGEABLE]
        if fixed:
            raise InputError(
                f"{', '.join(fixed)} cannot change any more: restore() and parallelise again. "
                f"Between generations {', '.join(CHANGEABLE)} may change"
            )
        return self.of(self, changes)

    def like(self, other: ParallelConfig, devices: Sequence[torch.device]) -> bool:
        """Whether ranks of these settings, made ready, serve ``other`` on these devices, too."""
        fixed = {f.name for f in dataclasses.fields(self)} - {*CHANGEABLE, "devices", "compile"}
        compile = other.compile is None or other.compile == self.compile
        same = all(getattr(self, name) == getattr(other, name) for name in fixed)
        return same and compile and tuple(devices) == self.devices

    @property
    def ranks(self) -> int:
        """Ranks of one group: N + S − 1; N in all schedules but the published one."""
        return rank_count(self.components, self.stride, self.schedule)

    def memory_of(self, rank: int) -> int | None:
        """Bytes that a rank's component may take, where that was said."""
        if isinstance(self.memory, tuple):
            return self.memory[rank] if rank < len(self.memory) else None
        return self.memory  # type: ignore[return-value]  # made of what read_memory returns

    @property
    def names(self) -> dict[str, str | None]:
        """The names of the denoiser's arguments, where they are not the usual ones."""
        return {"latents": self.latents, "timestep": self.timestep}

    @property
    def compresses(self) -> str | None:
        """How bundles are compressed; None, too, where there is none of an asynchronous step."""
        return None if self.schedule in EXACT or self.components == 1 else self.compress

    @property
    def splits(self) -> bool:
        """Whether conditions are ever split over groups of ranks."""
        return self.guidance == "split" or self.exact_mode == "split"

    @property
    def auto_warmup(self) -> AutoWarmup | None:
        """What decides about exact steps, if their number is not fixed."""
        if self.warmup == "auto":
            return AutoWarmup()
        return self.warmup if isinstance(self.warmup, AutoWarmup) else None

    def exact_steps(self, steps: int) -> int:
        """With how many exact steps a generation of ``steps`` begins; the most, if that is open."""
        auto = self.auto_warmup
        if auto is not None:
            return auto.bound(steps, self.exact_tail)
        return self.warmup  # type: ignore[return-value]  # or what check_numbers refuses

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data, for reports and JSON; what is not data is named."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del values["progress"]
        if self.devices is not None:
            values["devices"] = [str(d) for d in self.devices]
        if isinstance(self.warmup, AutoWarmup):
            values["warmup"] = dataclasses.asdict(self.warmup)
        if isinstance(self.order, Calibration):
            values["order"] = "calibrated" if self.order.taken else None
        if not isinstance(self.split, str):
            values["split"] = [s if isinstance(s, str) else list(s) for s in self.split]
        return values

    def compared(self) -> dict[str, Any]:
        """:meth:`to_dict`, with a calibration by what is in it: what processes of a group have to
        have alike."""
        values = self.to_dict()
        if isinstance(self.order, Calibration) and self.order.taken:
            values["order"] = f"calibration {self.order.fingerprint()}"
        return values


#: What may change between generations.
CHANGEABLE = ("warmup", "exact_mode", "exact_tail", "order")


class ReadOnlySettings:
    """Refuses to set an attribute with the name of a setting, which would change nothing."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ParallelConfig.__dataclass_fields__:
            raise AttributeError(
                f"settings are not attributes: read config.{name}"
                + (f", change it by configure({name}=…)" if name in CHANGEABLE else "")
            )
        super().__setattr__(name, value)
