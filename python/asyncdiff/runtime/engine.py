"""Runs plans over the components of one partition: workers, channels, ticks.

An engine belongs to one partition, one list of places and one signature of inputs. It knows
nothing of samplers: it is given latents and times for a step, and returns noise predictions. Where
ranks are in several processes, each has an engine with the workers of its own ranks; all of them go
through the same plans.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from typing import Any

import torch

import asyncdiff_core as core

from ..errors import ProcessError, RankError
from ..graph.compiled.ahead import Compiling
from ..graph.signature import Role
from ..graph.weights import Weights
from ..graph.writes import Written
from ..partition.partition import Partition
from ..phases import phase
from ..processes.team import Team
from ..progress import stage
from ..schedule.actions import Tick
from ..schedule.plan import Plan
from .channels import Channels
from .devices import Place
from .exchange.awaited import until_done
from .exchange.compression.sent import NOTHING_COMPRESSED, Compressed
from .exchange.meetings import warn_of_queues
from .executor import RankQueue, blamed
from .input_cache import InputCache
from .step import READY_NOW, Caller, Earlier, Inputs, Ready, Times
from .worker import Worker


class Engine:
    """Workers and channels for one partition at given places.

    ``places`` has one entry a rank: N + S − 1 (waves: N), ``seats`` one a process of ``team``: its
    own place, where it gets noise predictions if none of these ranks is its own. ``tensors`` are
    the inputs of a call, in the order of the signature; their values are used for a first run,
    which fixes how values lie in memory. ``slots`` and ``extrapolate`` are those of the plans that
    will be run. ``compile``: how components are compiled, if they are. ``compressed``: what crosses
    so. ``beside``: an engine whose ranks' streams this one's ranks use, in turn with it.

    Making an engine, :meth:`prepare`, :meth:`begin`, :meth:`finish` and :meth:`close` are
    collective; all processes issue the same ticks.
    """

    @phase("build")
    def __init__(
        self,
        partition: Partition,
        places: Sequence[Place],
        weights: Weights,
        tensors: Sequence[torch.Tensor],
        *,
        team: Team,
        seats: Sequence[Place],
        slots: int = 2,
        extrapolate: float = 0.0,
        deadline: float | None = None,
        compile: Compiling | None = None,
        beside: Engine | None = None,
        compressed: Compressed = NOTHING_COMPRESSED,
    ) -> None:
        self.partition = partition
        self.signature = partition.captured.signature
        self.places = list(places)
        self.team = team
        self.slots = slots
        self.cuda = self.places[0].device.type == "cuda"
        self._latents = self.signature.places[Role.LATENTS]
        #: this process's ranks, in order
        self.workers: list[Worker] = []

        def make() -> None:
            for rank, place in enumerate(self.places):
                if place.process != team.process:
                    continue
                index = min(rank, len(partition.components) - 1)
                stream = None if beside is None else beside.by_rank[rank].stream
                self.workers.append(
                    Worker(
                        partition, rank, index, place.device, weights, tensors, extrapolate, stream
                    )
                )

        team.together("make its ranks ready", make)
        self.by_rank = {w.rank: w for w in self.workers}
        self.conditioning = InputCache(
            self.signature.places[Role.CONDITIONING],
            set[int]().union(*(w.program.row_conditioning for w in self.workers)),
        )
        self.channels = Channels(partition, self.places, seats, team, slots, deadline, compressed)
        self.channels.connect(self.by_rank, [tensors[i] for i in self._latents])
        self.fabric = self.channels.fabric
        #: seconds that compiling took
        self.compile_s = 0.0
        if compile is not None:
            team.together("compile its ranks", functools.partial(self._compile, compile))
        self._queue = RankQueue(list(self.by_rank), self.fabric.abort, threads=not self.cuda)
        #: what :meth:`results` takes: of the tick that was issued last
        self._under_way: tuple[Tick, dict[int, Any], Caller | None, torch.device]
        self._hosts = len({p.host for p in self.places})
        self._meet = any(w.meetings is not None for w in self.workers)
        if self._meet:
            warn_of_queues({w.rank: w.device for w in self.workers})
        self._clean, self.closed = True, False
        self._ticks = 0  # issued since the engine was made
        self._ready: Plan | None = None  # the plan that was prepared last

    # ---- preparation -------------------------------------------------------------------------

    def bundle_bytes(self, exact: bool) -> dict[tuple[int, int], int]:
        """Bytes that cross from one component to another, in an exact step or another one."""
        return self.channels.bundle_bytes[exact]

    @phase("compile")
    def _compile(self, compiling: Compiling) -> None:
        started = time.perf_counter()
        pieces = [w.pieces(self._received(w), compiling) for w in self.workers]
        compiling.ahead(pieces)
        for worker, of_worker in zip(self.workers, pieces, strict=True):
            worker.compile(of_worker)
        self.compile_s = time.perf_counter() - started

    def _received(self, worker: Worker) -> dict[int, list[torch.Tensor]]:
        """What lies in a rank's mailboxes, by sending component."""
        component = self.partition.components[worker.index]
        return {b.source: worker.mailbox[b.source, 0] for b in component.reads}

    def prepare(self, plan: Plan) -> None:
        """Capture every CUDA graph that ``plan`` will replay. Raises what went wrong, a lack of
        memory too; work that no capture allows is issued as it is."""
        if not self.cuda or plan is self._ready:
            return
        self.team.together("record CUDA graphs", functools.partial(self._record, plan))
        self._ready = plan

    @phase("capture")
    def _record(self, plan: Plan) -> None:
        for worker in self.workers:
            worker.graphs.try_again()
        with stage("recording CUDA graphs"):
            self.channels.record(plan, self.by_rank)

    def graph_alone(self, worker: Worker) -> torch.cuda.CUDAGraph:
        """A graph of a rank's component on what lies in its mailboxes, without exchange."""
        return worker.graph_alone(self._received(worker))

    # ---- a generation ------------------------------------------------------------------------

    def begin(self, steps: int, tensors: Sequence[torch.Tensor], ready: Ready = READY_NOW) -> None:
        """Start a generation of so many steps, whose first call has these tensors: empty channels,
        nothing in flight.

        Its conditioning is compared with that of the generation before, if rows depend on it. On
        CUDA the host waits for that, here and not later; it was ``ready`` then, or is only now.
        """
        if not self._clean:
            self.abandon()
        for worker in self.workers:
            worker.begin(steps)
        self.conditioning.begin(tensors, ready.everything)
        self.channels.begin()
        with self.team.collective():
            self.fabric.reset()
        self._clean = False

    def issue(
        self,
        tick: Tick,
        tensors: Sequence[torch.Tensor],
        times: Times,
        earlier: Earlier,
        caller: Caller | None = None,
        ready: Ready = READY_NOW,
    ) -> None:
        """Issue one tick at the latents in ``tensors``; :meth:`results` are to be taken then.

        ``times`` are the timestep arguments by index. Runs of steps in ``earlier`` take their
        latents, and whatever else changes from step to step, from there; nobody may write to them
        any more. ``caller``: when all inputs are ready, if that is not what the stream is at now:
        other engines' results, which it waits for, may not be what this one has to wait for.
        ``ready``: the same, as far as it is known of what changes from step to step, which is all
        where nothing else is new, and of the rest.

        Raises RankError; the generation is abandoned then.
        """
        try:
            self.check()
            fresh = self.conditioning.changed(tensors)
            home = tensors[self._latents[0]].device
            if self.channels.inputs is not None:
                shared = self.channels.inputs
                tensors, earlier = shared.of_tick(tick, tensors, earlier, self._latents)
                caller, ready = None, READY_NOW
            if self.cuda:
                caller = caller or (ready.everything if fresh else ready.moves) or Caller(home)
            else:
                # The ranks' threads may still read these after the caller went on to change them.
                moving = {*self._latents, *fresh}
                tensors = [t.clone() if i in moving else t for i, t in enumerate(tensors)]
                times = {
                    k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in times.items()
                }
            self._ticks += 1
            if self.channels.sent is not None:
                self.channels.sent.add(tick)
            version = self.conditioning.version
            inputs = Inputs(self._ticks, tensors, times, earlier, fresh, version, caller)
            self._under_way = tick, self._run_ranks(tick, inputs), caller, home
            if fresh:  # ranks that did not run in this tick need the new conditioning too
                for worker in self.workers:
                    if worker.rank not in tick.ranks:
                        self._queue.submit(worker.rank, worker.feed, inputs)
        except BaseException as e:
            error = self._failed(e)
            raise error from error.__cause__

    def results(self) -> dict[int, list[Any]]:
        """The noise predictions of the tick that was issued last, by step; on CUDA ready in order
        of the current stream of the latents' device. Those of other processes, which may wait for
        what this one issues, are waited for. Raises RankError; the generation is abandoned then."""
        try:
            tick, issued, caller, home = self._under_way
            results = {}
            if arrivals := self.channels.arrivals:
                busy = [w.stream for w in self.workers if w.stream is not None]
                for run in tick.runs:
                    if run.step is not None and run.rank in arrivals:
                        results[run.step] = arrivals[run.rank].take(caller, busy)
            for step, each in issued.items():
                results[step] = self._queue.result(each)
            self._queue.check()
            if self.team.first_only and self.team.process != 0:
                return {step: self.channels.nothing(home) for step in tick.delivers}
            return results
        except BaseException as e:
            error = self._failed(e)
            raise error from error.__cause__

    def _run_ranks(self, tick: Tick, inputs: Inputs) -> dict[int, Any]:
        """Issue the runs of this process's ranks; what will be the results, by step."""
        submit, meets = self._queue.submit, self._meet and self.cuda
        apart = meets and self._hosts > 1
        if meets:
            # Where ranks wait for each other in the midst of their runs, no copy may come behind a
            # run, in a queue of the same GPU,
            for segment in tick.segments:
                if (worker := self.by_rank.get(segment.rank)) is not None:
                    submit(worker.rank, worker.take_ahead, segment, inputs)
        issued: dict[int, Any] = {}
        for segment in tick.segments:
            if (worker := self.by_rank.get(segment.rank)) is not None:
                made = submit(worker.rank, worker.issue, segment, inputs, not apart)
                if segment.step is not None:
                    issued[segment.step] = worker if apart else made
        if apart:  # and none before its end, where other hosts take part: see exchange/awaited.py
            until_done(w.stream for w in self.workers if w.stream is not None)
            return {step: submit(w.rank, w.deliver, inputs) for step, w in issued.items()}
        return issued

    def check(self) -> None:
        """Raise RankError for what is known to have gone wrong, without waiting; on CUDA that is
        what went wrong on the channels, behind the host's back."""
        self._queue.check()
        try:
            self.fabric.check()
        except core.CoreError as e:
            raise blamed(e, self.by_rank, self.places) from e

    @property
    def recovers(self) -> bool:
        """Whether the exchange goes on after a failure, in the next generation."""
        return self.fabric.recovers

    @property
    def over(self) -> bool:
        """Whether the exchange has failed for good, so that another engine has to be made."""
        if self.recovers:
            return False
        try:
            self.fabric.check()
        except core.CoreError:
            return True
        return False

    def give_up(self) -> None:
        """See to it that closing waits for no other process: all of them give this engine up."""
        with contextlib.suppress(core.CoreError):
            self.fabric.abort(self.channels.own_rank, "the exchange is made anew")

    def finish(self) -> None:
        """Wait for the generation's last work, in all processes, and raise what went wrong:
        RankError, or InputError where conditioning was written to in a way that nothing shows."""
        try:
            self.team.together("finish a generation", self._finish)
        except BaseException as e:
            error = self._failed(e)
            raise error from error.__cause__
        self._clean = True

    def _finish(self) -> None:
        self._queue.check(wait=True)
        self.synchronize()
        self.check()
        self.conditioning.check()

    def abandon(self, cause: BaseException | None = None) -> None:
        """Stop a generation in the middle, and wait until this process's ranks are idle.

        With a ``cause`` something went wrong, and ranks wait no longer; without, all ranks end what
        was issued: its results are the caller's already.
        """
        # Of a process that has ended everybody is told by the core.
        if not self._clean and cause is not None and not isinstance(cause, ProcessError):
            reason = f"the generation was abandoned ({type(cause).__name__}: {cause})"
            own = self.channels.own_rank
            with contextlib.suppress(core.CoreError):
                self.fabric.abort(own, reason)
        self._queue.settle()
        # A rank that failed may have missed its conditioning: what it computed since is of no use.
        self.conditioning.forget()
        with contextlib.suppress(Exception):  # an error of the device shows again in its next use
            self.synchronize()
        self._clean = True

    def _failed(self, error: BaseException) -> BaseException:
        """What to raise for an error in the middle of a generation, which is abandoned."""
        if isinstance(error, core.CoreError):
            # Where a rank of this process failed, the others were told, and this is what they say.
            try:
                self._queue.check(wait=True)
                told = blamed(error, self.by_rank, self.places)
                told.__cause__, error = error, told
            except RankError as e:
                error = e
        self.abandon(error)
        try:
            self.team.check()
        except ProcessError as e:
            e.__cause__ = error
            return e
        return error

    def renew(self, weights: Weights, written: Written) -> bool:
        """Compute with the weights that the denoiser has now; whether that was possible, else this
        engine has to be made anew. ``written``: which weights have other values."""
        self.idle()
        moved = [worker.renew(weights, written) for worker in self.workers]
        if any(moved):
            self._ready = None
        self.idle()
        self.forget()
        return None not in moved

    def forget(self) -> None:
        """What was computed ahead, of the timestep and the conditioning, fits no more."""
        self.conditioning.forget()

    def idle(self) -> None:
        """Wait until this process's ranks have done what was issued. Raises nothing that went
        wrong."""
        self._queue.wait()
        with contextlib.suppress(Exception):  # an error of the device shows again in its next use
            self.synchronize()

    def synchronize(self) -> None:
        """Wait until all ranks are idle."""
        for worker in self.workers:
            worker.synchronize()
        self.channels.synchronize()

    def exposed_ms(self) -> float | None:
        """By how long pushes outlast computation in a tick, worst rank of this process; None if not
        measured, as where tokens are shared out, which ranks exchange inside of a run."""
        if self._meet:
            return None
        values = [w.exposed_ms() for w in self.workers if w.senders]
        known = [v for v in values if v is not None]
        return max(known) if known else (0.0 if not values else None)

    def close(self) -> None:
        """Free threads, mailboxes and graphs."""
        self.closed = True
        self._queue.close()
        self.synchronize()
        for worker in self.workers:
            worker.close()
        self.channels.close()
