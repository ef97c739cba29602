"""Where the C++ library of the installed package lies, for builds that link it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

from ._core import build_info, cuda_built
from .errors import CoreError

_HERE = Path(__file__).resolve().parent


def get_include() -> str:
    """The folder to give to a compiler with -I: it holds ``asyncdiff/fabric.hpp`` and others.

    Raises CoreError where the package was copied without it, as do the functions below.
    """
    return _existing(_HERE / "include")


def get_cmake_dir() -> str:
    """The folder of the CMake package: ``find_package(asyncdiff_core)`` with
    ``-Dasyncdiff_core_DIR=<this>``."""
    return _existing(_HERE / "lib" / "cmake" / "asyncdiff_core")


def get_pkgconfig_dir() -> str:
    """The folder of ``asyncdiff.pc`` and, with CUDA, ``asyncdiff_cuda.pc``: for PKG_CONFIG_PATH."""
    return _existing(_HERE / "lib" / "pkgconfig")


def get_compile_flags(cuda: bool = False) -> list[str]:
    """What a compiler needs besides sources and a standard of C++17 or later.

    Without CMake or pkg-config. With ``cuda`` for GPUs too: these need the CUDA toolkit's headers,
    of the nvcc on the PATH; give their folder yourself where there is none. Raises CoreError where
    the package was built without CUDA, or that nvcc's runtime does not fit it.
    """
    flags = [f"-I{get_include()}"]
    return [*flags, "-DASYNCDIFF_WITH_CUDA", *_toolkit("INCLUDES")] if cuda else flags


def get_link_flags(cuda: bool = False) -> list[str]:
    """What a linker needs after the objects; the toolkit as for ``get_compile_flags``."""
    flags = [f"-L{_existing(_HERE / 'lib')}"]
    if cuda:
        flags += ["-lasyncdiff_cuda", "-lasyncdiff", *_toolkit("LIBRARIES"), "-lcudart_static"]
    else:
        flags.append("-lasyncdiff")
    return [*flags, "-lpthread", "-ldl", "-lrt"]


def _toolkit(what: str) -> list[str]:
    """INCLUDES or LIBRARIES of the nvcc on the PATH, which may be a link or a script: as flags, by
    what it says itself; nothing where there is none."""
    if not cuda_built():
        raise CoreError(
            "this asyncdiff was built without CUDA: install it with ASYNCDIFF_CUDA=on, "
            "or leave --cuda out"
        )
    if shutil.which("nvcc") is None:
        return []
    _check_release()
    command = ["nvcc", "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
    says = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    lines = [line.partition(f"#$ {what}=")[2] for line in says.splitlines()]
    return [flag for line in lines for flag in shlex.split(line)]


def _check_release() -> None:
    """A static CUDA runtime lacks what came after it, and the next major version lacks some."""
    command = ["nvcc", "--version"]
    says = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"release (\d+)\.(\d+)", says)
    built = tuple(int(part) for part in build_info()["cuda"].split("."))
    if found is None:
        return
    here = (int(found[1]), int(found[2]))
    if here[0] != built[0] or here < built:
        raise CoreError(
            f"asyncdiff was built with CUDA {built[0]}.{built[1]} and links with that or a later "
            f"CUDA {built[0]}, but the nvcc on the PATH is CUDA {here[0]}.{here[1]}: put another "
            "toolkit's bin folder first on the PATH, or reinstall asyncdiff with this one"
        )


def _existing(folder: Path) -> str:
    if folder.is_dir():
        return str(folder)
    if (_HERE.parent / "CMakeLists.txt").exists():
        raise CoreError(
            f"{folder} is missing: Python found asyncdiff_core in its source folder. Run this from "
            "another folder, or install into this one with pip install -e ."
        )
    raise CoreError(f"{folder} is missing: reinstall asyncdiff (pip install --force-reinstall)")
