"""Building C++ programs with CMake, for tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "cpp"


def run(*command: object, env: dict[str, str] | None = None) -> str:
    """What the command prints; fails the test with everything it said if it fails."""
    done = attempt(*command, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def attempt(
    *command: object, env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The command, done; ``env`` is what differs from this process's environment."""
    environment = os.environ | (env or {})
    return subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        cwd=cwd,
    )


def generator() -> list[str]:
    """CMake's arguments for Ninja, where it is installed."""
    return ["-G", "Ninja"] if shutil.which("ninja") else []


def build(source: Path, folder: Path, *options: str, env: dict[str, str] | None = None) -> None:
    """Configure and build ``source`` in ``folder``."""
    run("cmake", "-S", source, "-B", folder, *generator(), *options, env=env)
    run("cmake", "--build", folder, env=env)


def nccl_folder() -> Path | None:
    """Where NVIDIA's wheel has NCCL's header and library, if it is installed."""
    try:
        found = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        return None
    folders = [Path(x) for x in (found.submodule_search_locations or [])] if found else []
    return next((x for x in folders if (x / "include" / "nccl.h").exists()), None)


def without_nvcc() -> dict[str, str]:
    """An environment in which no CUDA compiler is found. Its PATH keeps cmake and ninja; where
    nvcc lies in /usr/bin it cannot be hidden, and is found all the same."""
    folders = [Path(tool).parent for name in ("cmake", "ninja") if (tool := shutil.which(name))]
    kept = [str(folder) for folder in folders if not (folder / "nvcc").exists()]
    hidden = {"CUDACXX": "", "CUDA_PATH": "", "CUDA_HOME": "", "CUDA_ROOT": ""}
    return {"PATH": ":".join([*kept, "/usr/bin", "/bin"]), **hidden}


def two_processes(program: Path, **environment: str) -> list[str]:
    """What each of two processes of an example says, with what a launcher sets, and more."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [program],
            env=os.environ | world | environment | {"RANK": str(rank), "ASYNCDIFF_AUTHKEY": "test"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return said
