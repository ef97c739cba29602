"""The CUDA compiler as NVIDIA's packages on PyPI, for machines with a GPU and no toolkit.

As a script it prints what to install, a line each; nothing where it is not wanted.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shlex
import shutil
import sys
from pathlib import Path

# The nvcc of CUDA 13 is on PyPI, that of CUDA 12 is not (its package has only ptxas). 13.0: any
# driver of CUDA 13 runs what it makes, PTX included.
RELEASE = "13.0"
_PACKAGES = (
    "nvidia-cuda-nvcc",
    "nvidia-cuda-crt",
    "nvidia-nvvm",
    "nvidia-cuda-runtime",
    "nvidia-cuda-cccl",
    "nvidia-nvtx",
)


def requirements() -> list[str]:
    """What to install from PyPI so that CUDA code compiles: nothing where a toolkit is found,
    ASYNCDIFF_CUDA is off, or is auto and there is no driver that could run the result."""
    return [f"{package}=={RELEASE}.*" for package in _PACKAGES] if _wanted() else []


def environment() -> dict[str, str]:
    """The variables with which CMake finds the compiler that ``requirements`` installed: nothing
    where it is not wanted or not installed."""
    toolkit = _toolkit() if _wanted() else None
    if toolkit is None:
        return {}
    # A toolkit's libraries lie in lib64, with a link for the linker; those of the packages do not.
    (runtime,) = (toolkit / "lib").glob("libcudart.so.*")
    libraries = [str(toolkit / "lib"), os.environ.get("LIBRARY_PATH", "")]
    # Fresh: an earlier build's compiler lay in an environment that is gone.
    arguments = ["--fresh", shlex.quote(f"-DCUDA_CUDART={runtime}")]
    arguments.append(os.environ.get("CMAKE_ARGS", ""))
    return {
        "CUDACXX": str(toolkit / "bin" / "nvcc"),
        "LIBRARY_PATH": ":".join(filter(None, libraries)),
        "CMAKE_ARGS": " ".join(filter(None, arguments)),
    }


def _wanted() -> bool:
    setting = os.environ.get("ASYNCDIFF_CUDA", "").lower() or "auto"
    if setting not in ("auto", "on") or _has_nvcc():
        return False
    if setting == "on":
        return True
    driver = _driver()
    needed = int(RELEASE.partition(".")[0])
    if driver is not None and driver[0] < needed:
        print(
            f"asyncdiff: this machine's driver is for CUDA {driver[0]}.{driver[1]}, and PyPI has "
            f"compilers for CUDA {needed} alone: building for the host only. For GPUs install a "
            f"driver of CUDA {needed}, or the CUDA toolkit {driver[0]} with nvcc on the PATH",
            file=sys.stderr,
        )
    return driver is not None and driver[0] >= needed


def _has_nvcc() -> bool:
    """Whether CMake will find a compiler of its own accord."""
    roots = [os.environ.get(name) for name in ("CUDAToolkit_ROOT", "CUDA_PATH")]
    folders = [str(Path(root) / "bin") for root in roots if root]
    return bool(os.environ.get("CUDACXX")) or any(
        shutil.which("nvcc", path=path) for path in (None, *folders)
    )


def _driver() -> tuple[int, int] | None:
    """The CUDA version that the installed driver supports; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _toolkit() -> Path | None:
    """The folder that the packages share, with bin, lib and include; None where one is missing."""
    try:
        files = [importlib.metadata.files(package) or [] for package in _PACKAGES]
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files[0]:
        if file.name == "nvcc" and file.parent.name == "bin":
            return Path(str(file.locate())).resolve().parents[1]
    return None


if __name__ == "__main__":
    print(*requirements(), sep="\n")
