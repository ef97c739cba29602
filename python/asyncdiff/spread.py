"""A denoiser spread over ranks: its settings, processes, places, weights and engines."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import CHANGEABLE, ParallelConfig, ReadOnlySettings
from .deadline import check_deadline
from .errors import BatchError, CaptureError, DeviceError, InputError
from .forking import Locked
from .graph.checkpoint import Checkpoint
from .graph.compiled.compile import pays
from .graph.signature import Call, Parser, check_devices, check_one_latents
from .graph.state.values import KnownValues, by_values
from .graph.weights import Weights
from .partition.ownership import check_split_argument
from .partition.speeds import check_entries
from .phases import Spent
from .processes.agreement import of_program, of_settings
from .processes.team import Team
from .runtime.cfg_parallel import Groups
from .runtime.devices import (
    Deployment,
    Place,
    check_count,
    places_of,
    rank_total,
    room_for,
    said_of,
)
from .runtime.engine import Engine
from .runtime.engine_cache import EngineCache
from .schedule.branch import ONLY, Branch

log = logging.getLogger("asyncdiff")


def check_each(config: ParallelConfig, ranks: int) -> None:
    """Raise InputError where settings that have an entry for each of the ranks have not."""
    check_entries("speeds", config.speeds, ranks)
    if isinstance(config.memory, tuple):
        check_entries("memory", config.memory, ranks)


class Spread(ReadOnlySettings, Locked):
    """``module`` on the ranks that ``config`` asks for, in the processes of ``group`` (None: in
    this one), before anything is known of its inputs; its weights from ``checkpoint``, if any."""

    def __init__(
        self,
        module: nn.Module,
        config: ParallelConfig,
        group: Any,
        results: str,
        checkpoint: str | Path | None,
    ) -> None:
        super().__init__()  # the lock, held by whoever runs a generation
        _check_picked(config)
        self.module = module
        self._parser = Parser(module, config.latents, config.timestep)
        #: whether engines are for values of masks, because the denoiser's sizes depend on them
        self._by_value = False
        self._values: KnownValues = {}
        #: what making engines ready took, whenever that was
        self._spent: weakref.WeakKeyDictionary[Engine | Groups, Spent] = weakref.WeakKeyDictionary()
        self._team = Team.of(group, check_deadline(config.deadline), results)
        with contextlib.ExitStack() as undo:
            undo.callback(self._team.close)
            self._team.together("make a denoiser", lambda: self._look(checkpoint))
            self._team.agree("make a denoiser", lambda: self._given(config))
            places = places_of(config, self._team)
            #: those that there are; settings may take the first of them only
            self._available = places
            if self._team.several and rank_total(config) > 1:
                check_count(config, places)
            self._weights = Weights(module, self._checkpoint)
            undo.callback(self._weights.restore)
            self._take(config, self._taken(config))
            undo.pop_all()

    def _look(self, checkpoint: str | Path | None) -> None:
        self._checkpoint = None if checkpoint is None else Checkpoint(checkpoint)

    def _given(self, config: ParallelConfig) -> dict[str, str]:
        settings = of_settings(config.compared() | {"results": str(self._team.first_only)})
        return {**of_program(self.module, self._checkpoint), **settings}

    def _taken(self, config: ParallelConfig) -> list[Place]:
        """The places that a configuration takes. Raises DeviceError where there are too few."""
        if not self._team.several:
            return places_of(config, self._team)
        ranks = rank_total(config)
        if ranks > len(self._available):
            raise DeviceError(
                f"these settings need {ranks} ranks, and the processes of the group have "
                f"{len(self._available)} ({said_of(self._available)})"
            )
        return self._available[:ranks]

    def _take(self, config: ParallelConfig, places: list[Place]) -> None:
        """Become a denoiser of these settings, without any engine yet."""
        check_each(config, len(places))
        devices = [p.device for p in places]
        here = [p.device for p in places if p.process == self._team.process]
        compile = config.compile
        if compile is None:
            compile = self._team.every("choose", lambda: pays(self.module, here))
        self._places = places
        self._config = replace(config, devices=tuple(devices), compile=compile)
        seats = [
            next(p for p in self._available if p.process == process)
            for process in range(self._team.count)
        ]
        #: where this process's pipeline works
        self._seat = seats[self._team.process].device
        self._engines = EngineCache(
            Deployment(self.module, self._weights, self._config, places, self._team, seats)
        )
        if compile and devices[0].type == "cuda":
            self._weights.channels_last()
        # Where tokens are shared out, each device has all of it, the denoiser's own too.
        all_here = config.schedule == "sequence" and self._weights.home in here
        if not all_here and (any(d != self._weights.home for d in here) or not here):
            self._weights.offload()

    # ---- calls -------------------------------------------------------------------------------

    def parse(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """A call's positional and keyword arguments taken apart; InputError where they do not
        fit."""
        call = self._parser(args, kwargs)
        return by_values(call, self._values) if self._by_value else call

    def _check(self, call: Call) -> None:
        """Raise InputError for a call that these ranks do not take."""
        check_devices(call, self._seat.type == "cuda")
        if self._config.schedule != "asyncdiff" or self._config.splits:
            check_one_latents(call)

    def _engine_for(
        self, call: Call, branch: Branch = ONLY, **options: Any
    ) -> tuple[Engine | Groups, Call]:
        """The engine for a call (see :meth:`~.runtime.engine_cache.EngineCache.get`), and the call
        that it is for: where the denoiser cannot be exported for all values of masks, that with
        these values. Raises BatchError where its batch is to be cut then."""
        cut = self._config.splits and branch.count == 1
        cut = cut or self._config.schedule == "pipeline"
        try:
            if cut and self._by_value:
                raise _uncut("It was prepared for these masks alone")
            return self._engines.get(call, branch=branch, **options), call
        except CaptureError as e:
            valued = call

            def look() -> bool:
                nonlocal valued
                valued = by_values(call, self._values)
                return valued is not call

            if not self._team.every("look at the values of masks", look):
                raise
            if cut:
                raise _uncut(str(e)) from e
            log.info("the denoiser is prepared for these masks of tokens alone: %s", e)
            engine = self._engines.get(valued, branch=branch, **options)
            self._by_value = True
            return engine, valued

    def _took(self, engine: Engine | Groups, spent: Spent) -> Spent:
        """Keep what was spent on an engine; all that was so far."""
        every = self._spent.setdefault(engine, Spent())
        every.add(spent)
        return every

    # ---- settings ----------------------------------------------------------------------------

    @property
    def config(self) -> ParallelConfig:
        """The settings, with the devices and whether components are compiled."""
        return self._config

    def configure(self, **changes: Any) -> None:
        """Change settings from the next generation on: warmup, exact_mode, exact_tail, order.

        Raises InputError for any other setting, PlanError for values that no plan has; nothing is
        changed then.
        """
        with self.lock:
            config = self._config.between_generations(changes)
            _check_picked(config)
            self._config = config

    def adopt(self, config: ParallelConfig) -> None:
        """Take other settings; where they cannot change between generations, ranks are prepared
        anew at the next call. Raises what the constructor does; nothing is changed then."""
        with self.lock:
            places = self._taken(config)
            if self._config.like(config, [p.device for p in places]):
                self._config = replace(self._config, **{n: getattr(config, n) for n in CHANGEABLE})
                return
            check_split_argument(self.module, config.split, config.components)
            self._let_go()
            self._take(config, places)

    def _let_go(self) -> None:
        """Give up what is under way, and free the engines."""
        self._engines.close()

    @property
    def holds_all(self) -> bool:
        """Whether the whole denoiser is in each process."""
        return self._checkpoint is None

    @property
    def team(self) -> Team:
        """The processes that own the ranks."""
        return self._team

    def link_speed(self) -> float:
        """Bytes a millisecond of the slowest kind of link between ranks, measured once.
        Collective."""
        return self._engines.link_speed()

    def room_on(self, device: torch.device, beside: Sequence[Spread] = ()) -> int | None:
        """Bytes that are free on a device of this process for this denoiser and those ``beside`` it
        that have no ranks yet; None on CPUs."""
        return room_for(device, self._weights, *(other._weights for other in beside))

    @property
    def places(self) -> list[Place]:
        """The places that there are; settings may take the first of them only."""
        return list(self._available)

    @property
    def devices(self) -> list[torch.device]:
        """One entry a rank; of another process's rank, as the device is called there."""
        return [place.device for place in self._places]

    @property
    def home(self) -> torch.device:
        """The device on which a sampler's tensors belong."""
        own = self._weights.home
        return own if own.type == self._seat.type else self._seat

    @contextlib.contextmanager
    def own_modes(self) -> Iterator[None]:
        """Without the caller's modes: what ranks keep is written to outside of inference mode, too,
        and has no gradient; a captured denoiser's dtypes are those of its weights."""
        kind = self._seat.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
            yield


def _uncut(why: str) -> BatchError:
    return BatchError(
        "guidance='split' of a batch, exact_mode='split' and schedule='pipeline' need a denoiser "
        "that can be exported for all masks of tokens: take guidance='batched', exact_mode='chain' "
        f"or 'sequence', and another schedule. {why}"
    )


def _check_picked(config: ParallelConfig) -> None:
    """Raise InputError where something is still to be picked."""
    if config.exact_mode == "auto":
        raise InputError(
            "exact_mode='auto' is picked by the calls of a pipeline, with parallelize(pipe): of an "
            "AsyncDenoiser write 'chain', 'split' or 'sequence'"
        )
