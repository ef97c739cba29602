"""The C++ library: its own tests, and a program built against the installed package."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from cmake_build import ROOT, build, run

import asyncdiff_core as core


@pytest.fixture(autouse=True)
def tools() -> None:
    if not (ROOT / "CMakeLists.txt").exists() or shutil.which("cmake") is None:
        pytest.skip("no sources or no CMake here")


def test_paths_on_the_command_line() -> None:
    out = run(sys.executable, "-m", "asyncdiff_core", "--cmakedir", "--includes", "--info")
    cmake, include, *info = out.splitlines()
    assert (Path(cmake) / "asyncdiff_core-config.cmake").exists()
    assert cmake == core.get_cmake_dir()
    assert (Path(include.removeprefix("-I")) / "asyncdiff" / "fabric.hpp").exists()
    assert any(line.startswith("version: ") for line in info)


def test_example_against_the_installed_package(tmp_path: Path) -> None:
    if core.cuda_built() and shutil.which("nvcc") is None:
        pytest.skip("the package holds CUDA code, which links with the CUDA toolkit only")
    cmake = f"-Dasyncdiff_core_DIR={core.get_cmake_dir()}"
    build(ROOT / "examples" / "cpp", tmp_path, cmake)
    out = run(tmp_path / "exchange")
    assert "host: 10 bundles" in out
    if not core.cuda_built():
        return
    fused = run(tmp_path / "fused_get")
    if core.cuda_devices() == 0:
        assert "no GPU" in out and "no GPU" in fused
    else:
        assert "CUDA devices" in out
        assert "fused get (kernel): 10 bundles" in fused and "fused get (copy)" in fused


def test_example_without_cmake(tmp_path: Path) -> None:
    """A compiler and what the command line says are enough."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    if core.cuda_built() and shutil.which("nvcc") is None:
        pytest.skip("the package holds CUDA code, which links with the CUDA toolkit only")
    flags = run(sys.executable, "-m", "asyncdiff_core", "--cflags", "--libs")
    compile_flags, link_flags = (line.split() for line in flags.splitlines())
    assert compile_flags == core.get_compile_flags() and link_flags == core.get_link_flags()
    source, program = ROOT / "examples" / "cpp" / "exchange.cpp", tmp_path / "exchange"
    run(compiler, *compile_flags, source, "-o", program, *link_flags)
    out = run(program)
    assert "host: 10 bundles" in out
    assert ("GPU" in out or "CUDA devices" in out) == core.cuda_built()


def test_cmake_build_tests_and_install(tmp_path: Path) -> None:
    """The library without Python: CTest, then the example against the installed build."""
    options = ["-DASYNCDIFF_PYTHON=OFF", "-DASYNCDIFF_TESTS=ON", "-DASYNCDIFF_CUDA=off"]
    build(ROOT, tmp_path / "build", *options)
    run("ctest", "--test-dir", tmp_path / "build", "--output-on-failure")
    run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "prefix")
    build(ROOT / "examples" / "cpp", tmp_path / "example", f"-DCMAKE_PREFIX_PATH={tmp_path}/prefix")
    assert "host: 10 bundles" in run(tmp_path / "example" / "exchange")
