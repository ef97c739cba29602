"""What every benchmark writes beside its figures: hardware, versions, command, time."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """The machine and the software that the figures belong to."""
    import torch

    import asyncdiff_core

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    out: dict[str, Any] = {
        "commit": commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "gpus": gpus,
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "core": asyncdiff_core.build_info(),
    }
    if gpus:
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        out["driver"] = driver.splitlines()[0] if driver else None
        out["links"] = _links(len(gpus))
    simulated = asyncdiff_core.simulated_link()
    if simulated is not None:
        out["simulated_link"] = simulated
    nccl = {k: v for k, v in sorted(os.environ.items()) if k.startswith("NCCL_")}
    if nccl:
        out["nccl"] = nccl  # how it was told to go from GPU to GPU
    try:
        import diffusers

        out["diffusers"] = diffusers.__version__
    except ImportError:
        pass
    return out


def write(path: Path, figures: Any) -> None:
    """One JSON document: ``environment`` and ``figures``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"environment": environment(), "figures": figures}
    # Whole or not at all: a run that writes again and again may be stopped at any time.
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(fresh, path)


def _links(gpus: int) -> list[str]:
    """The rows of nvidia-smi's topology between GPUs, as "GPU0 X NV18"."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", _output("nvidia-smi", "topo", "-m") or "")
    rows = [line.split() for line in text.splitlines()]
    return [
        " ".join(row[: gpus + 1])
        for row in rows
        if len(row) > gpus
        and row[1:2] != ["GPU1"]
        and row[0].startswith("GPU")
        and row[0][3:].isdigit()
    ]


@functools.cache
def commit() -> str:
    """The commit of the engine that is measured, with ``+`` where files differ from it; "unknown"
    where it is no checkout."""
    where = ("-C", str(Path(__file__).parent))
    return _output("git", *where, "describe", "--always", "--dirty=+", "--exclude=*") or "unknown"


@functools.cache
def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
