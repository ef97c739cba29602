"""A queue of pictures, and the thread that draws them one after another on all devices."""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import asyncdiff

log = logging.getLogger("server")

#: How long a picture takes is told of so many of the last ones.
_LAST = 100


class Full(Exception):
    """So many pictures wait already that no further one is taken."""


class Cancelled(Exception):
    """Raised between two steps of a picture that nobody wants any more."""


@dataclass
class Job:
    """A picture: what is asked for, and what has become of it."""

    arguments: dict[str, Any]
    seed: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    #: "queued", then "drawing", then "done", "cancelled" or "failed"
    status: str = "queued"
    step: int = 0
    error: str | None = None
    image: Any = None
    seconds: float | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


class Drawing:
    """Draws with the pipeline that ``load`` returns, on ``devices``.

    All calls of the pipeline are made by one thread: the pipeline, the ranks and their CUDA graphs
    are there once. It prepares ``sizes`` (height, width) before the first picture. At most
    ``waiting`` pictures wait, and the last ``kept`` that ended are remembered.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        devices: list[str] | None,
        sizes: list[tuple[int, int]],
        steps: int,
        *,
        quality: str = "balanced",
        waiting: int = 64,
        kept: int = 256,
    ) -> None:
        self._load, self._devices, self._quality = load, devices, quality
        self._sizes, self._steps = sizes, steps
        self._queue: queue.Queue[Job | None] = queue.Queue(waiting)
        self._jobs: collections.OrderedDict[str, Job] = collections.OrderedDict()
        self._kept = kept + waiting + 1
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        #: what a new picture is drawn by; None before
        self.handle: Any = None
        self.ready = threading.Event()
        #: why it will never be ready
        self.broken: str | None = None
        #: nothing is drawn any more
        self._over = False
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds: collections.deque[float] = collections.deque(maxlen=_LAST)
        self._thread = threading.Thread(target=self._run, name="drawing")

    def start(self) -> None:
        """Load the model and prepare, in the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel what waits and what is drawn, and give the devices back."""
        self._stopping.set()
        for job in self.jobs():
            self.cancel(job)
        while self._thread.is_alive():  # the queue may be full
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=0.1)
                self._thread.join()

    # ---- pictures ----------------------------------------------------------------------------

    def submit(self, arguments: dict[str, Any], seed: int) -> Job:
        """Put a picture into the queue. Raises Full, also where none is drawn any more."""
        job = Job(arguments, seed)
        with self._lock:
            try:
                if self._over:
                    raise queue.Full
                self._queue.put_nowait(job)
            except queue.Full:
                self.counts["refused"] += 1
                raise Full from None
            self._jobs[job.id] = job
            while len(self._jobs) > self._kept:
                self._jobs.popitem(last=False)
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a picture: at once in the queue, else after the step that is under way."""
        job.cancel.set()
        with self._lock:
            if job.status == "queued":
                self._end(job, "cancelled")

    def job(self, id: str) -> Job | None:
        """The picture of this name; None where there is none, or not any more."""
        with self._lock:
            return self._jobs.get(id)

    def jobs(self) -> list[Job]:
        """All that are known, the oldest first."""
        with self._lock:
            return list(self._jobs.values())

    @property
    def queued(self) -> int:
        """How many wait."""
        return self._queue.qsize()

    # ---- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            pipe = self._load()
            with asyncdiff.parallelize(pipe, self._devices, quality=self._quality) as handle:
                for height, width in self._sizes:
                    for made in handle.prepare(height=height, width=width, steps=self._steps):
                        log.info("prepared %s", made)
                self.handle = handle
                self.ready.set()
                while (job := self._queue.get()) is not None:
                    self._draw(pipe, job)
        except Exception as e:  # whoever asks is told
            log.exception("no picture can be drawn")
            self.broken = f"{type(e).__name__}: {e}"
        finally:
            self.ready.set()
            self._end_all()

    def _draw(self, pipe: Any, job: Job) -> None:
        begun = time.perf_counter()
        try:
            with self._lock:
                if job.ended.is_set():  # cancelled in the queue
                    return
                job.status = "drawing"
            job.image = pipe(
                **job.arguments,
                generator=torch.Generator().manual_seed(job.seed),
                callback_on_step_end=lambda pipe, step, t, given: self._step(job, step, given),
            ).images[0]
            job.seconds = time.perf_counter() - begun
            self.seconds.append(job.seconds)
            self._end(job, "done")
        except Cancelled:
            self._end(job, "cancelled")
        except Exception as e:  # the next picture may be drawn
            log.warning("picture %s failed", job.id, exc_info=True)
            self._end(job, "failed", f"{type(e).__name__}: {e}")

    def _step(self, job: Job, step: int, given: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline between two steps."""
        job.step = step + 1
        if job.cancel.is_set():
            raise Cancelled
        return given

    def _end(self, job: Job, status: str, error: str | None = None) -> None:
        job.error, job.status = error, status
        self.counts[status] += 1
        job.ended.set()

    def _end_all(self) -> None:
        """Nothing is drawn any more: whoever waits hears of it."""
        with self._lock:
            self._over = True
        for job in self.jobs():
            if not job.ended.is_set():
                stopped = self._stopping.is_set()
                self._end(job, "cancelled" if stopped else "failed", self.broken)
