"""The benchmark of the node, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("comfy", reason="COMFYUI names no folder of ComfyUI")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "comfyui" / "run.py"


def test_each_way_is_timed_and_exact_ones_are_exact(tmp_path: Path) -> None:
    out = tmp_path / "comfyui.json"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--model", "tiny", "--steps", "4"]
    command += ["--rounds", "1", "--out", str(out)]
    subprocess.run(command, check=True, env=os.environ, timeout=300)
    figures = json.loads(out.read_text())["figures"]["tiny"]["ways"]
    assert set(figures) == {"plain", "exact", "conditions split", "defaults", "balanced"}
    for name in ("exact", "conditions split"):
        assert figures[name]["distance_to_plain"] < 1e-4
    assert all(row["s"]["median"] > 0 for row in figures.values())
