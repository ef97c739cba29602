"""Where the C++ library of the installed package lies, for builds that link it."""

from __future__ import annotations

from pathlib import Path

from .errors import CoreError

_HERE = Path(__file__).resolve().parent


def get_include() -> str:
    """The folder to give to a compiler with -I: it holds ``asyncdiff/fabric.hpp`` and others."""
    return _existing(_HERE / "include")


def get_cmake_dir() -> str:
    """The folder of the CMake package: ``find_package(asyncdiff_core)`` with
    ``-Dasyncdiff_core_DIR=<this>``."""
    return _existing(_HERE / "lib" / "cmake" / "asyncdiff_core")


def _existing(folder: Path) -> str:
    if not folder.is_dir():
        raise CoreError(f"{folder} is missing: reinstall asyncdiff (pip install --force-reinstall)")
    return str(folder)
