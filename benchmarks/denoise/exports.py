"""Exports and measured node costs that the teams of one model have in common."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from asyncdiff.runtime import making
from asyncdiff.runtime.cutting import cutter, profiler
from denoise.beside import Lock


class Exports:
    """Makes asyncdiff keep them: once for each module and signature of a call, in place of once for
    each team. ``spared`` are the seconds that teams would have spent on them otherwise."""

    def __init__(self, lock: Lock) -> None:
        self.spared = 0.0
        self._kept: dict[Any, tuple[Any, float]] = {}  # also keeps alive what the keys name
        capture, measure = cutter.capture, profiler.measure

        def captured(module: Any, call: Any, sizes: Any = None) -> Any:
            if sizes is not None:  # it lets go of weights
                return capture(module, call, sizes)

            def made() -> Any:
                found = capture(module, call)
                return found, dict(found.weights), module

            found, weights, _ = self._once((id(module), call.signature), made)
            found.weights |= weights  # a denoiser that was closed has let go of them
            return found

        def measured(captured: Any, tensors: Any, device: Any, *rest: Any) -> Any:
            def quietly() -> Any:
                with lock.quiet():
                    return measure(captured, tensors, device, *rest)

            return self._once((id(captured), str(device)), quietly)

        engine, component_ms = making.Engine, making.component_ms

        def made(*args: Any, compile: Any = None, **options: Any) -> Any:
            # Compiling takes too long for others to wait, and mostly the CPU.
            with lock.quiet() if compile is None else contextlib.nullcontext():
                return engine(*args, compile=compile, **options)

        def timed(*asked: Any) -> Any:
            with lock.quiet():
                return component_ms(*asked)

        cutter.capture, profiler.measure = captured, measured
        making.Engine, making.component_ms = made, timed

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key in self._kept:
            self.spared += self._kept[key][1]
        else:
            begun = time.perf_counter()
            self._kept[key] = make(), time.perf_counter() - begun
        return self._kept[key][0]

    def forget(self) -> None:
        """Keep nothing: of a model that is done."""
        self._kept.clear()
