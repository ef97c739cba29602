"""NCCL, which ranks on GPUs of several hosts need: where pip has put it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from . import _core


def find_in_wheel() -> None:
    """Tell the core of the library in a wheel of nvidia-nccl-cu13 or -cu12, if one is installed.

    It is taken where none is loaded already, as torch does, and the loader finds none.
    """
    path = wheel_library()
    if path is not None:
        _core.set_nccl_path(str(path))


def wheel_library() -> Path | None:
    """The file of NCCL's library in an installed wheel."""
    try:
        found = find_spec("nvidia.nccl")
    except ModuleNotFoundError:  # nothing of NVIDIA's is installed
        return None
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder, "lib", "libnccl.so.2")
        if path.is_file():
            return path
    return None
