"""Exports that serve calls of several sizes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from ..graph.capture import Captured
from ..graph.signature import Call, Signature
from ..graph.state.structure import Structure
from ..graph.tracing.resizing import Resizable, Twin, equal
from ..graph.tracing.symbols import open_sizes, structure_of

log = logging.getLogger("asyncdiff")

#: Structures of calls that are remembered.
_KEPT = 4


#: Exports the denoiser for a call, with symbols for some sizes, if any are named.
Export = Callable[..., Captured]


class Sizes:
    """The exports of ``module`` for calls of which only sizes of the conditioning differ, prompts
    of other lengths for example. The second one that comes is exported with symbols for sizes; for
    those that follow numbers are put in their place. Where that cannot be, each is exported."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        #: by structure, and state of the denoiser: what was exported first, and with symbols (None:
        #: that cannot be)
        self._twins: dict[Any, Twin] = {}
        self._found: dict[Any, Resizable | None] = {}

    def capture(self, call: Call, state: Any, export: Export) -> Captured:
        """``module``, which is in a ``state``, captured for a call. Raises what ``export`` does,
        which takes the call and, maybe, the sizes that are to be symbols."""
        key = structure_of(call.signature), state
        twin = self._twins.get(key)
        if twin is None or twin.signature == call.signature:
            return export(call)
        if key not in self._found:
            made = self._with_symbols(call, key, twin, export)
            if made is not None:
                return made
        resizable = self._found[key]
        made = None if resizable is None else self._at(resizable, call.signature, twin)
        if made is None:
            return export(call)
        log.info("sizes were put into the export for others in %.1f s", made.seconds)
        return made

    def saw(self, captured: Captured, state: Any) -> None:
        """``captured`` is there, exported or read from the disk."""
        key = structure_of(captured.signature), state
        if key not in self._twins:
            self._twins[key] = Twin.of(captured)
            if len(self._twins) > _KEPT:
                oldest = next(iter(self._twins))
                del self._twins[oldest]
                self._found.pop(oldest, None)

    def _with_symbols(self, call: Call, key: Any, twin: Twin, export: Export) -> Captured | None:
        """Export with symbols, and keep that if it comes to what an export without them is. What
        was exported without them for that, if it was."""
        self._found[key] = None
        try:
            sizes = open_sizes(twin.signature, call.signature)
            resizable = Resizable(export(call, sizes))
        except Exception as e:  # the exporter raises what it likes
            log.debug("the denoiser is not exported with symbols for sizes: %s", e)
            return None
        plain, signature = None, twin.signature
        if self._at(resizable, signature, twin) is None:
            # They are on another side of a condition, as a prompt that needs no padding is.
            plain, signature = export(call), call.signature
            self._twins[key] = twin = Twin.of(plain)
        at = self._at(resizable, signature, twin)
        if at is not None and equal(at, twin):
            self._found[key] = resizable
        return plain

    def _at(self, resizable: Resizable, signature: Signature, twin: Twin) -> Captured | None:
        """What an export with symbols is for a call, or None."""
        try:
            return resizable.at(signature, Structure(self._module), twin)
        except Exception as e:  # also what nobody thought of: it is exported then
            log.debug("an export with symbols for sizes does not serve: %s", e)
            return None
