"""The export of a denoiser, or what an earlier process kept of the same one."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import nn

from ..graph.capture import Captured
from ..graph.signature import Call
from ..phases import phase
from ..turns import alone
from .folder import Folder, preparations
from .graph_text import of_data, to_data
from .key import of_graph

log = logging.getLogger("asyncdiff")

_KIND = "graph"
#: Characters that tell people what an entry is of.
_SHORT = 120


def kept_capture(module: nn.Module, call: Call, export: Callable[[], Captured]) -> Captured:
    """What ``export`` returns for ``module`` and ``call``: made of what the folder of preparations
    has, where an equal denoiser was exported before, else exported and kept there. Processes that
    ask for the same at the same time export it once. Raises what ``export`` does."""
    folder = preparations()
    if not folder.usable():
        return _exported(export)
    try:
        with phase("load"):
            key = of_graph(module, call)
    except Exception as e:  # a denoiser without a word, or whatever its attributes raise
        log.debug("the export is not kept: %s", e)
        return _exported(export)
    found = _found(folder, key, module, call)
    if found is not None:
        return found
    with alone(folder.turn(_KIND, key)):
        found = _found(folder, key, module, call)
        if found is None:
            found = _exported(export)
            _keep(folder, key, module, found)
    return found


@phase("export")
def _exported(export: Callable[[], Captured]) -> Captured:
    return export()


@phase("load")
def _found(folder: Folder, key: str, module: nn.Module, call: Call) -> Captured | None:
    data = folder.read(_KIND, key)
    if data is None:
        return None
    try:
        captured = of_data(data, module, call)
        name, seconds = type(module).__name__, captured.seconds
        log.info("captured %s by what was kept: %.1f s", name, seconds)
        return captured
    except Exception as e:  # whatever is in a file that is not what it says
        folder.say(f"a preparation on the disk is ignored, {folder.file(_KIND, key)}: {e!r}")
        return None


@phase("export")
def _keep(folder: Folder, key: str, module: nn.Module, captured: Captured) -> None:
    try:
        data = to_data(captured)
    except Exception as e:  # what has no words, or whatever its constants raise
        log.debug("the export is not kept: %s", e)
        return
    inputs = [x for x in captured.signature.inputs if x.shape]
    shapes = ", ".join(f"{x.name} {'x'.join(map(str, x.shape))}" for x in inputs)
    folder.write(_KIND, key, f"{type(module).__name__}: {shapes}"[:_SHORT], data)
