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


RESTARTED = """
import os, signal, torch
from toys import toy, toy_call
from asyncdiff import AsyncDenoiser
split = [["enter", "down"], ["mix", "up", "leave"]]
denoiser = AsyncDenoiser(toy(), group="env", split=split, deadline=20)
call, first = toy_call(), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
latents, times = call["sample"], torch.tensor([900, 800, 700, 600])
with denoiser.generation(times):
    for k, t in enumerate(times):
        if first and k == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        (noise,) = denoiser(latents, t, call["encoder_hidden_states"])
        latents = latents - 0.1 * noise
# Another one over the same store, which waits for other times.
AsyncDenoiser(toy(), group="env", split=split, deadline=30).close()
os.write(1, f"drawn {'at first' if first else 'again'}: {float(latents.mean())}\\n".encode())
denoiser.close()
"""


def test_a_restart(tmp_path: Path) -> None:
    """torchrun starts both again when one is killed, over the store that lived on."""
    (tmp_path / "draw.py").write_text(RESTARTED)
    said = torchrun(tmp_path, "--max-restarts", "1", str(tmp_path / "draw.py")).splitlines()
    assert len(said) == 2 and said[0] == said[1] and "drawn again" in said[0]


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
