"""Where in a denoiser something went wrong."""

from __future__ import annotations

import linecache
from typing import Any

from torch import nn


def where(module: nn.Module, error: BaseException) -> str:
    """The layer and the line of its source in which ``error`` was raised, in brackets; "" where
    that was in none of the denoiser's."""
    paths = {id(vars(child)): path for path, child in module.named_modules()}
    found = ""
    trace = error.__traceback__
    while trace is not None:
        frame: Any = trace.tb_frame
        layer = frame.f_locals.get("self")
        # Also of an object that stands for the denoiser, with its attributes.
        if isinstance(layer, nn.Module) and id(vars(layer)) in paths:
            line = linecache.getline(frame.f_code.co_filename, trace.tb_lineno).strip()
            inside = frame.f_code.co_filename.startswith(_TORCH)
            if line and not inside:
                found = f" (in {paths[id(vars(layer))] or 'its forward'}: {line})"
        trace = trace.tb_next
    return found


#: Torch's own files say nothing of the denoiser.
_TORCH = nn.__file__.rsplit("nn", 1)[0]
