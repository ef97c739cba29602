"""A queue of pictures, and the thread that draws them one after another on all devices."""

from __future__ import annotations

import collections
import io
import logging
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
    """Raised between two steps of a picture, or of preparing, that nobody wants any more."""


@dataclass(eq=False)
class Job:
    """A picture: what is asked for, and what has become of it."""

    arguments: dict[str, Any]
    seed: int
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    #: "queued", then "drawing", then "done", "cancelled" or "failed"
    status: str = "queued"
    step: int = 0
    error: str | None = None
    #: PNG: of hundreds that are remembered the pixels would fill the memory
    image: bytes = b""
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
        self._most, self._kept = waiting, kept
        self._waiting: collections.deque[Job] = collections.deque()
        self._ended: collections.deque[Job] = collections.deque()
        self._jobs: dict[str, Job] = {}
        #: guards these three, and is told of pictures that wait
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._loaded = threading.Event()
        #: what it prepares just now
        self.doing = "loading"
        #: what a new picture is drawn by; None before
        self.handle: Any = None
        self.ready = threading.Event()
        #: why it will never be ready
        self.broken: str | None = None
        #: nothing is drawn any more
        self._over = False
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds: collections.deque[float] = collections.deque(maxlen=_LAST)
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)

    def start(self) -> None:
        """Load the model and prepare, in the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel what waits, is drawn or prepared, and give the devices back."""
        self._stopping.set()
        with self._changed:
            for job in list(self._jobs.values()):
                self.cancel(job)
            self._changed.notify_all()
        # Nothing interrupts loading, and the thread gives up after it.
        if self._loaded.is_set() and self._thread.is_alive():
            self._thread.join()

    # ---- pictures ----------------------------------------------------------------------------

    def submit(self, arguments: dict[str, Any], seed: int) -> Job:
        """Put a picture into the queue. Raises Full, also where none is drawn any more."""
        job = Job(arguments, seed)
        with self._changed:
            if self._over or len(self._waiting) >= self._most:
                self.counts["refused"] += 1
                raise Full
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a picture: at once in the queue, else after the step that is under way."""
        job.cancel.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")

    def job(self, id: str) -> Job | None:
        """The picture of this name; None where there is none, or not any more."""
        with self._changed:
            return self._jobs.get(id)

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._waiting)

    # ---- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            try:
                pipe = self._load()
            finally:
                self._loaded.set()
            self._told("loading", 1, 1)
            with asyncdiff.parallelize(
                pipe, self._devices, quality=self._quality, progress=self._told
            ) as handle:
                for height, width in self._sizes:
                    for made in handle.prepare(height=height, width=width, steps=self._steps):
                        log.info("prepared %s", made)
                self.handle = handle
                self.ready.set()
                while (job := self._next()) is not None:
                    self._draw(pipe, job)
        except Exception as e:  # whoever asks is told
            if self._stopping.is_set():  # Cancelled, or an error that names it as its cause
                self.broken = "the server stops"
            else:
                log.exception("no picture can be drawn")
                self.broken = f"{type(e).__name__}: {e}"
        finally:
            self.ready.set()
            self._end_all()

    def _told(self, what: str, done: int, total: int) -> None:
        """Called while something is prepared, which may take minutes."""
        self.doing = f"{what}: {done} of {total}"
        if self._stopping.is_set():
            raise Cancelled

    def _next(self) -> Job | None:
        """The next picture, which is drawn from now on; None where none is drawn any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping.is_set())
            if self._stopping.is_set():
                return None
            job = self._waiting.popleft()
            job.status = "drawing"
            return job

    def _draw(self, pipe: Any, job: Job) -> None:
        begun = time.perf_counter()
        try:
            image = pipe(
                **job.arguments,
                generator=torch.Generator().manual_seed(job.seed),
                callback_on_step_end=lambda pipe, step, t, given: self._step(job, step, given),
            ).images[0]
            job.seconds = time.perf_counter() - begun
            self.seconds.append(job.seconds)
            file = io.BytesIO()
            image.save(file, "PNG")
            job.image = file.getvalue()
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
        with self._changed:
            job.error, job.status = error, status
            self.counts[status] += 1
            self._ended.append(job)
            while len(self._ended) > self._kept:
                del self._jobs[self._ended.popleft().id]
        job.ended.set()

    def _end_all(self) -> None:
        """Nothing is drawn any more: whoever waits hears of it."""
        with self._changed:
            self._over = True
            while self._waiting:
                self._end(self._waiting.popleft(), "failed", self.broken)
