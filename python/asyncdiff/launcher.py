"""What started this process: torchrun and its like start several, and say so in the environment."""

from __future__ import annotations

import functools
import os
import warnings


def several_processes() -> bool:
    """Whether this process is one of several that torchrun, or a launcher like it, has started."""
    size = os.environ.get("WORLD_SIZE", "")
    return "RANK" in os.environ and size.isdigit() and int(size) > 1


def speaks() -> bool:
    """Whether this process is the one of them that says and writes what all of them have done."""
    return not several_processes() or os.environ["RANK"] == "0"


@functools.cache
def warn_of_processes() -> None:
    """Warn, once, where several processes would each do all of the work."""
    if several_processes():
        warnings.warn(
            f"this is process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} (torchrun?), and "
            "each of them will do all of the work: pass group='env', so that each has a rank, or "
            "start the program without a launcher",
            stacklevel=3,
        )
