"""Where the C++ library of the installed package lies, for builds that link it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from ._core import cuda_built
from .errors import CoreError

_HERE = Path(__file__).resolve().parent


def get_include() -> str:
    """The folder to give to a compiler with -I: it holds ``asyncdiff/fabric.hpp`` and others."""
    return _existing(_HERE / "include")


def get_cmake_dir() -> str:
    """The folder of the CMake package: ``find_package(asyncdiff_core)`` with
    ``-Dasyncdiff_core_DIR=<this>``."""
    return _existing(_HERE / "lib" / "cmake" / "asyncdiff_core")


def get_compile_flags() -> list[str]:
    """What a compiler needs besides sources, where there is no CMake.

    A package with CUDA needs the toolkit's headers as well: that of the nvcc on the PATH, or give
    its folder yourself where there is none.
    """
    flags = ["-std=c++17", f"-I{get_include()}"]
    if cuda_built():
        flags += ["-DASYNCDIFF_WITH_CUDA", *_toolkit("INCLUDES")]
    return flags


def get_link_flags() -> list[str]:
    """What a linker needs after the objects, where there is no CMake; the toolkit as above."""
    flags = [f"-L{_existing(_HERE / 'lib')}", "-lasyncdiff"]
    if cuda_built():
        flags += [*_toolkit("LIBRARIES"), "-lcudart_static"]
    return [*flags, "-lpthread", "-ldl", "-lrt"]


def _toolkit(what: str) -> list[str]:
    """INCLUDES or LIBRARIES of the nvcc on the PATH, which may be a link or a script: as flags, by
    what it says itself; nothing where there is none."""
    if shutil.which("nvcc") is None:
        return []
    command = ["nvcc", "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
    says = subprocess.run(command, capture_output=True, text=True).stderr
    lines = [line.partition(f"#$ {what}=")[2] for line in says.splitlines()]
    return [flag for line in lines for flag in shlex.split(line)]


def _existing(folder: Path) -> str:
    if not folder.is_dir():
        raise CoreError(f"{folder} is missing: reinstall asyncdiff (pip install --force-reinstall)")
    return str(folder)
