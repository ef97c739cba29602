"""Building C++ programs with CMake, for tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: object) -> str:
    """What the command prints; fails the test with everything it said if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, folder: Path, *options: str) -> None:
    """Configure and build ``source`` in ``folder``."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run("cmake", "-S", source, "-B", folder, *generator, *options)
    run("cmake", "--build", folder)
