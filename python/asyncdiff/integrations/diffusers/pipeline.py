"""One call for diffusers pipelines: ``handle = asyncdiff.parallelize(pipe)``.

The pipeline and its denoiser stay the objects that they are; each gets a subclass of its own
class. The denoiser's forward goes to the engine; the pipeline's call is serialised.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...config import Devices, ParallelConfig
from ...denoiser import AsyncDenoiser
from ...errors import InputError
from ...graph.capture import capture
from ...graph.example_inputs import example_inputs
from ...graph.hooks import check_forward, check_hooks, check_layers
from ...graph.signature import parse
from ...launcher import warn_of_processes
from ...partition.cost import estimate
from ...partition.cost import measure as measure_costs
from ...partition.memory import Limits
from ...partition.ownership import Split, check_split_argument
from ...partition.partition import Partition, partition
from ...partition.shards import shards
from ...partition.speeds import at_speeds, check_entries, runners
from ...quality import AUTO, DEFAULT, check_quality
from ...runtime.devices import devices_of, every_device
from ...sampling.scheduler import check_order
from ...schedule.plan import check_numbers
from ...spread import check_each
from ..auto import AutoExactMode, AutoSettings
from .background import BACKGROUND, FIRST, check_when, plain_copy
from .denoisers import find_denoiser, find_denoisers
from .handle import Handle
from .subclass import HANDLE, twin


def parallelize(
    pipe: Any,
    devices: Devices = None,
    *,
    group: Any = None,
    results: str = "all",
    checkpoint: str | Path | Mapping[str, str | Path] | None = None,
    denoiser: str | Sequence[str] | None = None,
    quality: str | None = AUTO,
    prepare: str = FIRST,
    config: ParallelConfig | None = None,
    **settings: Any,
) -> Handle:
    """Run the denoiser of a diffusers pipeline on several devices at once.

    The pipeline is used as before; a new generation is noticed by itself. Preparation (export,
    measuring, CUDA graphs) happens at the first call with inputs of a new shape. A pipeline that is
    parallelised already is restored first, and gets the new settings.

    How a generation is spread is chosen when it begins, for the devices, the number of steps, the
    sampler, guidance or none, pictures and memory: ``quality`` says how close to the plain
    pipeline's its pictures have to be. Or it is given by hand.

    Args:
        pipe: a pipeline whose denoiser is called in each step of its scheduler, once or several
            times (guidance in two calls).
        devices: those that may be used, once each (None: all GPUs, else the CPU); by hand, one
            entry a rank.
        group: the processes that own the ranks, each of which runs the pipeline with the same
            inputs and gets the same pictures: a torch.distributed ProcessGroup, a dimension of a
            DeviceMesh, or "env" (torchrun's variables); see :class:`asyncdiff.AsyncDenoiser`.
            ``devices`` are then those of this process's own ranks (None: the one that it uses).
        results: of a group, who gets pictures: "all" processes, or the "first"; the others' are
            noise, and the time for their VAE is theirs (``output_type="latent"`` saves it).
        checkpoint: where the denoiser's weights are (``folder/unet``), so that each process reads
            and holds those of its own ranks only; see :class:`asyncdiff.AsyncDenoiser`. Of several
            denoisers by their names.
        denoiser: the attribute of the pipeline that is its denoiser; of several that have a part of
            the steps each, those, in order. None: ``unet``, or ``transformer`` and
            ``transformer_2``, else the one model that takes a timestep.
        quality: "exact" (nothing changes in the pictures), "high", "balanced" or "fast";
            ``handle.settings`` says what was chosen, and why. "auto": "balanced", unless ``config``
            or a setting that a quality would choose is given (``components``, ``stride``,
            ``warmup``, ``time_shift``, ``schedule``, ``delay``, ``order``, ``exact_tail``,
            ``extrapolate``, ``guidance``, ``exact_mode``, or ``split`` as lists): then what is
            given holds, and the others are at their defaults. None: the same with nothing given.
        prepare: "first": the first call prepares, and draws then. "background": the first calls
            draw plainly, as the pipeline did, on one device, with a copy of the denoiser's layers
            on the same weights, while a thread prepares for calls like the first of them; leave the
            denoiser as it is until ``handle.ready`` (``handle.wait()``). Later calls of other sizes
            prepare as ever.
        config, settings: by keyword, what :class:`asyncdiff.ParallelConfig` lists; ``config``: all
            of them at once, from which ``settings`` differ. Where there are no more steps than
            exact ones, all are exact.

    Raises PlanError, PartitionError, DeviceError, InputError or SchedulerError, and leaves the
    pipeline as it was; with a group MismatchError and ProcessError, too. What is wrong with a
    group, a checkpoint, or weights to draw with in the background shows only after a pipeline that
    was parallelised is restored. While a pipeline runs, CaptureError where the denoiser cannot be
    exported.
    """
    check_when(prepare, group, checkpoint)
    if group is None:
        warn_of_processes()
    modules = find_denoisers(pipe, denoiser)
    auto = _quality(quality, config, settings)
    if devices is not None or config is None:
        settings["devices"] = devices
    every: list[torch.device] = []
    if auto is not None:
        settings["components"] = 1
        if group is None:
            settings["devices"] = (every := every_device(devices))[:1]
    config = ParallelConfig.of(config, settings, group)
    picks_mode = auto is None and config.exact_mode == AUTO
    if picks_mode:
        config = replace(config, exact_mode="chain")
    if checkpoint is not None and not isinstance(checkpoint, Mapping):
        checkpoint = dict.fromkeys(modules, checkpoint)
    if checkpoint is not None and (len(set(checkpoint.values())) < len(modules)):
        raise InputError(
            f"{type(pipe).__name__} has the denoisers {', '.join(modules)}: give each its own "
            "checkpoint, checkpoint={name: folder, …}"
        )
    # Its own handle is of other denoisers where somebody has put these in their place.
    before = [getattr(pipe, "__dict__", {}).get(HANDLE)]
    before += [_check(pipe, module, config) for module in modules.values()]
    check_hooks()
    if config.schedule == "wavefront":
        check_order(getattr(pipe, "scheduler", None))
    if group is None:
        check_each(config, len(devices_of(config)))
    for held in filter(None, before):
        held.restore()
    later = prepare == BACKGROUND
    plain = {n: plain_copy(twin(module)) for n, module in modules.items()} if later else {}
    spread: dict[str, AsyncDenoiser] = {}
    made: dict[str, tuple[AsyncDenoiser, AutoSettings | None]] = {}
    with contextlib.ExitStack() as undo:
        for name, module in modules.items():
            path = None if checkpoint is None else checkpoint.get(name)
            spread[name] = AsyncDenoiser(
                twin(module), group=group, results=results, checkpoint=path, config=config
            )
            undo.callback(spread[name].close)
        for count, (name, one) in enumerate(spread.items(), start=1):
            processes = [one.team.process] * len(every) or [p.process for p in one.places]
            own = [rank for rank, process in enumerate(processes) if process == one.team.process]
            there = every or [p.device for p in one.places]
            chosen = None
            if auto is not None or picks_mode:
                kind = AutoExactMode if picks_mode else AutoSettings
                chosen = kind(auto or "", there, config, own, list(spread.values())[count:])
            made[name] = one, chosen
        handle = Handle(pipe, made, {n: x.to(made[n][0].home) for n, x in plain.items()})
        undo.pop_all()
    return handle


def _check(pipe: Any, module: nn.Module, config: ParallelConfig) -> Handle | None:
    """Raise an error for a denoiser that cannot be spread. The handle of one that is, which is to
    be restored before."""
    check_forward(module)
    check_split_argument(module, config.split, config.components)
    held: Handle | None = module.__dict__.get(HANDLE)
    if held is not None and pipe.__dict__.get(HANDLE) is not held:
        raise InputError(
            f"this {type(pipe).__name__} shares its denoiser with a {type(held.pipe).__name__} "
            "that is parallelised: call asyncdiff.restore(pipe) first"
        )
    check_layers(twin(module))
    return held


#: Settings that a quality chooses.
_CHOSEN = {
    "components", "stride", "warmup", "time_shift", "schedule", "delay", "order", "exact_tail",
    "extrapolate", "guidance", "exact_mode",
}  # fmt: skip


def _quality(
    quality: str | None, config: ParallelConfig | None, settings: Mapping[str, Any]
) -> str | None:
    """The quality that chooses the settings; None where they are given by hand. Raises InputError
    for one that there is not, or beside settings that it would choose."""
    if quality is None:
        return None
    by_hand = sorted(_CHOSEN & set(settings)) if config is None else ["config"]
    if not isinstance(settings.get("split", ""), str):
        by_hand.append("split")
    if quality == AUTO:
        return None if by_hand else DEFAULT
    check_quality(quality)
    if by_hand:
        raise InputError(
            f"quality={quality!r} chooses what {', '.join(by_hand)} would say: leave that out, or "
            "leave quality out"
        )
    return quality


def restore(pipe: Any) -> None:
    """Make a pipeline what it was before :func:`parallelize`; nothing if it is not parallelised.

    A pipeline that shares its denoiser will do, too. Raises InputError for one without a denoiser.
    """
    held = getattr(pipe, "__dict__", {}).get(HANDLE)
    each = [held] if held is not None else _handles(pipe)
    for handle in each:
        handle.restore()


def _handles(pipe: Any) -> list[Handle]:
    """Those of the denoisers of a pipeline that is not parallelised itself."""
    found = (module.__dict__.get(HANDLE) for module in find_denoisers(pipe).values())
    return [handle for handle in found if handle is not None]


def plan_partition(
    pipe: Any,
    components: int,
    split: Split = "auto",
    *,
    device: str | torch.device | None = None,
    measure: bool | None = None,
    height: int | None = None,
    width: int | None = None,
    copies: int = 1,
    tokens: bool = False,
    speeds: Sequence[float] | None = None,
    memory: int | str | Sequence[int | str | None] | None = None,
) -> Partition:
    """How a pipeline's denoiser would be split, without running the pipeline.

    Engines may cut elsewhere: they measure the links, and components once these are placed.

    Inputs are made up from the denoiser's configuration (batch 2, for guidance) for pictures of
    ``height`` × ``width`` pixels (default: the denoiser's own size). ``measure``: time the nodes
    on ``device`` (default: there where the denoiser is, unless that is the meta device).
    ``copies``: ranks that run the last component, as many as the stride but for waves.
    ``speeds`` and ``memory``: of the ranks' devices, as in :class:`asyncdiff.ParallelConfig`.
    ``tokens``: not split, but with its tokens shared out among so many ranks. Raises TokensError
    where they cannot be, MemoryLimitError where that does not fit.
    """
    check_numbers(components, 1, 1)
    module = find_denoiser(pipe)
    check_split_argument(module, split, components)
    args = example_inputs(
        module, height=height, width=width, scale=getattr(pipe, "vae_scale_factor", 1)
    )
    call = parse(module, (), args)
    captured = capture(module, call)
    home = call.tensors[0].device
    where = torch.device(device) if device is not None else home
    costs = None
    if measure if measure is not None else where.type != "meta" and home.type != "meta":
        costs = measure_costs(captured, call.tensors, where)
    ranks = components + copies - 1
    check_entries("speeds", speeds, ranks)
    limits = None
    if memory is not None:
        allowed = ParallelConfig(memory=memory).memory_of
        running = runners(components, copies, ranks)
        each = (min(filter(None, map(allowed, mine)), default=None) for mine in running)
        limits = Limits(tuple(each), runs=not tokens)  # activations are those of all tokens
    if tokens:
        of_ranks = None if speeds is None else list(speeds)[:ranks]
        parts = shards(captured, ranks, costs, speeds=of_ranks)
        if limits is not None:
            parts.check(limits)
        return parts
    if speeds is not None:
        costs = at_speeds(costs or estimate(captured), speeds, runners(components, copies, ranks))
    return partition(captured, components, split, costs=costs, copies=copies, limits=limits)
