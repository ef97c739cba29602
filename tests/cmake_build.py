"""Building C++ programs with CMake, for tests."""

from __future__ import annotations

import os
import shutil
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


def without_nvcc() -> dict[str, str]:
    """An environment in which no CUDA compiler is found. Its PATH keeps cmake and ninja; where
    nvcc lies in /usr/bin it cannot be hidden, and is found all the same."""
    folders = [Path(tool).parent for name in ("cmake", "ninja") if (tool := shutil.which(name))]
    kept = [str(folder) for folder in folders if not (folder / "nvcc").exists()]
    hidden = {"CUDACXX": "", "CUDA_PATH": "", "CUDA_HOME": "", "CUDA_ROOT": ""}
    return {"PATH": ":".join([*kept, "/usr/bin", "/bin"]), **hidden}
