"""The C++ examples against the installed package, on GPUs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cmake_build import ROOT, build, run

import asyncdiff_core as core


def test_examples_exchange_on_gpus(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("nvcc") is None:
        pytest.skip("needs CMake and nvcc")
    build(ROOT / "examples" / "cpp", tmp_path, f"-Dasyncdiff_core_DIR={core.get_cmake_dir()}")
    assert "CUDA devices" in run(tmp_path / "exchange")
    out = run(tmp_path / "fused_get")
    assert "fused get (kernel): 10 bundles" in out and "fused get (copy): 10 bundles" in out
