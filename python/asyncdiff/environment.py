"""Environment variables that Python code of ours reads itself; the core reads the others, and this
one too, in csrc/src/env.cpp."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """Where measurements and preparations are kept: ``ASYNCDIFF_CACHE``, else
    ``$XDG_CACHE_HOME/asyncdiff``, else ``~/.cache/asyncdiff``. None for nowhere: "off", or no home.

    The same folder as the core's.
    """
    given = os.environ.get("ASYNCDIFF_CACHE", "")
    if given:
        return None if given == "off" else Path(given)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if shared:
        return Path(shared) / "asyncdiff"
    home = os.environ.get("HOME", "")
    return Path(home) / ".cache" / "asyncdiff" if home else None
