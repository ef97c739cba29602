"""Preparing while pictures are drawn plainly: the first ones do not wait for the engine."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ...errors import InputError
from ...graph.layers.quantized import own_classes
from ...progress import watched, within
from ...quiet import keeping

log = logging.getLogger("asyncdiff")

#: Seconds that a picture, and what takes times, wait for each other.
_PATIENCE = 60.0
#: When a pipeline is prepared: in its first call, or beside its first calls.
FIRST, BACKGROUND = "first", "background"
#: The denoisers of a call that runs plainly, by name; None: it does not.
plainly: ContextVar[Mapping[str, nn.Module] | None] = ContextVar("asyncdiff_plain", default=None)


#: Set when the main thread has ended: the interpreter waits for other threads then.
_ending = threading.Event()


class _EndingError(BaseException):
    """Ends what nobody will use any more. No Exception, which whatever prepares may catch."""


@functools.cache
def _notice_the_end() -> None:
    """Have :data:`_ending` set at the end of the main thread, before pools of threads are closed,
    which says no public interface; without it the thread's own state tells a little later."""
    with contextlib.suppress(AttributeError, RuntimeError):
        threading._register_atexit(_ending.set)  # type: ignore[attr-defined]


def _over() -> bool:
    return _ending.is_set() or not threading.main_thread().is_alive()


def _go_on(doing: str) -> None:
    if _over():
        raise _EndingError(doing)


def check_when(when: str, group: Any, checkpoint: Any) -> None:
    """Raise InputError for a time of preparing that there is not, or not with these."""
    if when not in (FIRST, BACKGROUND):
        raise InputError(f"prepare={when!r}: write 'first' or 'background'")
    if when == BACKGROUND and (group is not None or checkpoint is not None):
        raise InputError(
            "prepare='background' draws with the whole denoiser in this process meanwhile: leave "
            "group and checkpoint out, or prepare"
        )


def plain_copy(module: nn.Module) -> nn.Module:
    """The denoiser as layers of its own, whose weights lie where those of ``module`` lie now, also
    when that is exported, or moved elsewhere. Raises InputError for quantised weights."""
    for name, weight in own_classes(module).items():
        raise InputError(
            f"prepare='background' draws with a copy of the denoiser's layers, and {name} is "
            f"quantised ({type(weight).__name__}), which has to stay one: leave prepare out"
        )
    memo: dict[int, Any] = {}
    for weight in [*module.parameters(), *module.buffers()]:
        shared = weight.detach()
        if isinstance(weight, nn.Parameter):
            shared = nn.Parameter(shared, requires_grad=weight.requires_grad)
        memo[id(weight)] = shared
    return copy.deepcopy(module, memo)


class Background:
    """Prepares in a thread of its own, once, by what ``rehearse`` does with a pipeline and its
    arguments; ``denoisers`` draw meanwhile."""

    def __init__(
        self,
        denoisers: Mapping[str, nn.Module],
        rehearse: Callable[[Any, dict[str, Any]], None],
    ) -> None:
        self.denoisers = denoisers
        self._rehearse = rehearse
        self._thread: threading.Thread | None = None
        #: whether the first call has to prepare
        self._unfit = False
        #: one call at a time
        self._calls = threading.RLock()
        self._changed = threading.Condition()
        self._drawing, self._quiet = 0, False
        #: whether a picture was drawn meanwhile
        self.drawn = False

    @property
    def here(self) -> bool:
        """Whether this is the thread that prepares."""
        return threading.current_thread() is self._thread

    @property
    def over(self) -> bool:
        """Whether it has ended, in one way or another."""
        return self._unfit or (self._thread is not None and not self._thread.is_alive())

    def begin(self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Prepare for calls like this one, unless that has begun."""
        with self._calls:
            if self._thread is None:
                self._begin(pipe, args, kwargs)

    def _begin(self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if getattr(pipe, "_all_hooks", None):
            log.warning(
                "models of this pipeline are offloaded, which two threads cannot do at once: it is "
                "prepared by its first call, not in the background"
            )
            self._unfit = True
            return
        try:
            given = _arguments(pipe, args, kwargs)
        except TypeError:  # the pipeline will say so itself
            return
        other = copy.copy(pipe)
        other.scheduler = copy.deepcopy(pipe.scheduler)
        if hasattr(other, "set_progress_bar_config"):
            own = dict(getattr(pipe, "_progress_bar_config", None) or {})
            other.set_progress_bar_config(**own | {"disable": True})
        self._thread = threading.Thread(
            target=self._prepare, args=(other, given), name="asyncdiff prepares"
        )
        _notice_the_end()
        self._thread.start()

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Meanwhile the pipeline draws plainly. Waits while times are taken."""
        with self._calls:
            with self._changed:
                self._changed.wait_for(lambda: not self._quiet or self._drawing, _PATIENCE)
                self._drawing += 1
            token = plainly.set(self.denoisers)
            try:
                yield
                self.drawn = True
            finally:
                plainly.reset(token)
                with self._changed:
                    self._drawing -= 1
                    self._changed.notify_all()

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """No picture is drawn meanwhile: one that is under way is waited for, within limits."""
        with self._changed:
            self._quiet = True
            self._changed.wait_for(lambda: not self._drawing, _PATIENCE)
        try:
            yield
        finally:
            with self._changed:
                self._quiet = False
                self._changed.notify_all()

    def wait(self) -> None:
        """Wait until it has ended, if it has begun."""
        if self._thread is not None and not self.here:
            self._thread.join()

    def _prepare(self, pipe: Any, given: dict[str, Any]) -> None:
        try:
            # The terminal is the pictures'.
            quietly = within(lambda what, done, total: None)
            with quietly, keeping(self._undisturbed), watched(_go_on):
                self._rehearse(pipe, given)
        except _EndingError:
            pass
        except Exception as e:
            if _over():  # what comes of that
                return
            log.warning("preparing in the background failed, the next picture does: %s", e)


def _arguments(pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a pipeline's call that decide what is prepared, by keyword; its own random numbers
    and callbacks stay the caller's. Raises TypeError where they do not fit."""
    signature = inspect.signature(type(pipe).__call__)
    bound = signature.bind(pipe, *args, **kwargs).arguments
    out: dict[str, Any] = {}
    for name, value in list(bound.items())[1:]:
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            out |= value
        else:
            out[name] = value
    out = {n: x for n, x in out.items() if not n.startswith("callback")}
    if "output_type" in signature.parameters:
        out["output_type"] = "latent"
    if "generator" in signature.parameters:
        count = len(out["generator"]) if isinstance(out.get("generator"), list) else 0
        fresh = [torch.Generator().manual_seed(i) for i in range(max(count, 1))]
        out["generator"] = fresh if count else fresh[0]
    return out
