"""The examples of inference stacks, and the command line, in two processes that torchrun starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
STACKS = Path(__file__).parents[2] / "examples" / "stacks"


def torchrun(folder: Path, *command: str, processes: int = 2) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1"),
            *("--master-port", str(port), "--nproc-per-node", str(processes), *command),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=folder,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stdout


def test_diffusers(tmp_path: Path) -> None:
    said = torchrun(tmp_path, str(STACKS / "torchrun_diffusers.py"))
    assert "a picture of 16 x 16 pixels by 2 ranks" in said
    assert (tmp_path / "torchrun_diffusers.png").exists()


def test_worker_loop(tmp_path: Path) -> None:
    said = torchrun(tmp_path, str(STACKS / "worker_loop.py"))
    assert "6 requests, all processes drew the same: True" in said
    assert said.count("aborted") == 1


def test_the_command_line(tmp_path: Path) -> None:
    """One process says what was drawn."""
    command = ("generate", "--demo", "-p", "a cat", "--steps", "6", "--out", "cat.png")
    said = torchrun(tmp_path, "-m", "asyncdiff", *command)
    assert said.count("picture: ") == 1 and (tmp_path / "cat.png").exists()
