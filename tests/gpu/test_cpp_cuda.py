"""The C++ examples against the installed package, on GPUs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cmake_build import ROOT, build, nccl_folder, run, two_processes
from conftest import devices_for

import asyncdiff_core as core


def test_examples_exchange_on_gpus(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("nvcc") is None:
        pytest.skip("needs CMake and nvcc")
    build(ROOT / "examples" / "cpp", tmp_path, f"-Dasyncdiff_core_DIR={core.get_cmake_dir()}")
    assert "CUDA devices" in run(tmp_path / "exchange")
    out = run(tmp_path / "fused_get")
    assert "fused get (kernel): 10 bundles" in out and "fused get (copy): 10 bundles" in out


def test_a_callers_communicator(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("nvcc") is None:
        pytest.skip("needs CMake and nvcc")
    if (nccl := nccl_folder()) is None:
        pytest.skip("needs NCCL's header: pip install nvidia-nccl-cu13 (or -cu12)")
    devices_for("several GPUs", 2)
    where = [f"-Dasyncdiff_core_DIR={core.get_cmake_dir()}", f"-DNCCL_ROOT={nccl}"]
    build(ROOT / "examples" / "stacks" / "cpp", tmp_path, *where)
    said = two_processes(tmp_path / "over_nccl", LD_LIBRARY_PATH=str(nccl / "lib"))
    assert said == ["", "100 bundles of 1 MiB between GPUs\n"]
