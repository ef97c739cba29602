"""The C++ library: its own tests, and every way in which a program comes to it."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from cmake_build import (
    EXAMPLE,
    ROOT,
    attempt,
    build,
    generator,
    nccl_folder,
    run,
    two_processes,
    without_nvcc,
)

import asyncdiff_core as core

# Compiled in half the time.
DEBUG = "-DCMAKE_BUILD_TYPE=Debug"
HOST = ["-DASYNCDIFF_PYTHON=OFF", "-DASYNCDIFF_CUDA=off"]
COMMAND = (sys.executable, "-m", "asyncdiff_core")

# A program that calls functions of all headers, catches what the library throws, and tells the
# versions of both.
PROGRAM = """
#include <cstdio>
#include <string>
#include <asyncdiff/channel.hpp>
#include <asyncdiff/errors.hpp>
#include <asyncdiff/layout.hpp>
#include <asyncdiff/memory.hpp>
#include <asyncdiff/shared_memory.hpp>
#include <asyncdiff/version.hpp>
#if ASYNCDIFF_VERSION_NUMBER < 100
#error "an old version"
#endif
int main() {
  if (asyncdiff::mode_from("copy") != asyncdiff::Mode::kCopy) return 1;
  if (asyncdiff::channel_name(0, {1}) != "0 to 1") return 1;
  if (asyncdiff::allocate_host(3).nbytes != 3) return 1;
  asyncdiff::remove_leftovers();
  try {
    asyncdiff::open_shared("no handle", 1);
    return 1;
  } catch (const asyncdiff::InvalidArgument&) {
  }
  try {
    asyncdiff::element_size("no such type");
  } catch (const asyncdiff::InvalidArgument&) {
    std::printf("%s %s\\n", ASYNCDIFF_VERSION, asyncdiff::version());
    return 0;
  }
  return 1;
}
"""
VERSION = core.build_info()["version"]


@pytest.fixture(autouse=True)
def tools() -> None:
    if not (ROOT / "CMakeLists.txt").exists() or shutil.which("cmake") is None:
        pytest.skip("no sources or no CMake here")


@pytest.fixture
def compiler() -> str:
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


@pytest.fixture
def program(tmp_path: Path) -> Path:
    source = tmp_path / "program.cpp"
    source.write_text(PROGRAM)
    return source


def needs_toolkit() -> None:
    if core.cuda_built() and shutil.which("nvcc") is None:
        pytest.skip("what was built with CUDA links with the CUDA toolkit only")


def test_paths_on_the_command_line() -> None:
    out = run(*COMMAND, "--cmakedir", "--pkgconfigdir", "--includes", "--info")
    cmake, pkgconfig, include, *info = out.splitlines()
    assert (Path(cmake) / "asyncdiff_core-config.cmake").exists()
    assert cmake == core.get_cmake_dir()
    assert (Path(pkgconfig) / "asyncdiff.pc").exists()
    (include,) = shlex.split(include)
    assert (Path(include.removeprefix("-I")) / "asyncdiff" / "fabric.hpp").exists()
    assert any(line.startswith("version: ") for line in info)


@pytest.mark.slow
def test_find_package_from_the_wheel(tmp_path: Path) -> None:
    needs_toolkit()
    cmake = f"-Dasyncdiff_core_DIR={core.get_cmake_dir()}"
    build(EXAMPLE, tmp_path, cmake)
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


def exchange_in_c(program: Path) -> None:
    assert two_processes(program) == ["", f"1000 bundles with asyncdiff {VERSION}\n"]


def test_c_from_the_wheel(tmp_path: Path) -> None:
    cmake = f"-Dasyncdiff_core_DIR={core.get_cmake_dir()}"
    build(ROOT / "examples" / "c", tmp_path, cmake, env=without_nvcc())
    exchange_in_c(tmp_path / "exchange_c")


def test_over_what_a_stack_has(tmp_path: Path) -> None:
    """A key-value store of the caller's; a communicator of NCCL, where its header is, is compiled
    (tests/gpu/test_cpp_cuda.py runs it)."""
    needs_toolkit()
    nccl = nccl_folder()
    where = [f"-Dasyncdiff_core_DIR={core.get_cmake_dir()}"]
    where += [f"-DNCCL_ROOT={nccl}"] if nccl else []
    build(ROOT / "examples" / "stacks" / "cpp", tmp_path, *where)
    said = two_processes(tmp_path / "over_a_store")
    assert said == ["1000 bundles in a ring of 2 processes\n", ""]
    assert (tmp_path / "over_nccl").exists() or not (nccl and core.cuda_built())


def test_the_host_alone_needs_no_toolkit(tmp_path: Path) -> None:
    """Also from a package that was built with CUDA."""
    build(EXAMPLE, tmp_path, f"-Dasyncdiff_core_DIR={core.get_cmake_dir()}", env=without_nvcc())
    assert "host: 10 bundles" in run(tmp_path / "exchange")


def test_flags_of_the_command_line(tmp_path: Path, compiler: str) -> None:
    """A compiler and what the command line says are enough; the language's standard is its own."""
    out = run(*COMMAND, "--cflags", "--libs", env=without_nvcc())
    compile_flags, link_flags = (shlex.split(line) for line in out.splitlines())
    assert compile_flags == core.get_compile_flags() and link_flags == core.get_link_flags()
    assert not [flag for flag in compile_flags if flag.startswith("-std")]
    source, example = EXAMPLE / "exchange.cpp", tmp_path / "exchange"
    run(compiler, "-std=c++20", *compile_flags, source, "-o", example, *link_flags)
    assert "host: 10 bundles" in run(example)


def test_flags_for_gpus(tmp_path: Path, compiler: str) -> None:
    if not core.cuda_built():
        failed = attempt(*COMMAND, "--libs", "--cuda")
        assert failed.returncode == 2 and "built without CUDA" in failed.stderr
        return
    needs_toolkit()
    out = run(*COMMAND, "--cflags", "--libs", "--cuda")
    compile_flags, link_flags = (shlex.split(line) for line in out.splitlines())
    source, example = EXAMPLE / "exchange.cpp", tmp_path / "exchange"
    run(compiler, *compile_flags, source, "-o", example, *link_flags)
    out = run(example)
    assert "GPU" in out or "CUDA devices" in out


def test_an_older_toolkit_is_refused(tmp_path: Path) -> None:
    """It would fail only when linking, by an undefined reference."""
    if not core.cuda_built():
        pytest.skip("built without CUDA")
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 12.0, V12.0.140\n")
    nvcc.chmod(0o755)
    path = {"PATH": f"{nvcc.parent}:/usr/bin:/bin"}
    failed = attempt(*COMMAND, "--libs", "--cuda", env=path)
    assert failed.returncode == 2 and "nvcc on the PATH is CUDA 12.0" in failed.stderr

    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "FindCUDAToolkit.cmake").write_text(
        "set(CUDAToolkit_FOUND TRUE)\nset(CUDAToolkit_VERSION 12.0.140)\n"
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(user LANGUAGES CXX)\n"
        f"set(CMAKE_MODULE_PATH {modules})\n"
        "find_package(asyncdiff_core REQUIRED COMPONENTS cuda)\n"
    )
    where = f"-Dasyncdiff_core_DIR={core.get_cmake_dir()}"
    failed = attempt("cmake", "-S", tmp_path, "-B", tmp_path / "build", *generator(), where)
    assert failed.returncode != 0
    assert "CUDA toolkit found is 12.0.140" in re.sub(r"\s+", " ", failed.stderr)


@pytest.mark.slow
def test_static_install(tmp_path: Path, compiler: str, program: Path) -> None:
    """CTest, then find_package and pkg-config from a folder with a space in its name."""
    prefix = tmp_path / "a prefix"
    build(ROOT, tmp_path / "build", *HOST, "-DASYNCDIFF_TESTS=ON", "-DCMAKE_INSTALL_LIBDIR=lib")
    run("ctest", "--test-dir", tmp_path / "build", "--output-on-failure")
    run("cmake", "--install", tmp_path / "build", "--prefix", prefix)
    assert not list(prefix.rglob("*.so*")) and not list(prefix.rglob("*.in"))
    build(EXAMPLE, tmp_path / "example", f"-DCMAKE_PREFIX_PATH={prefix}", env=without_nvcc())
    assert "host: 10 bundles" in run(tmp_path / "example" / "exchange")
    build(ROOT / "examples" / "c", tmp_path / "c", f"-DCMAKE_PREFIX_PATH={prefix}")
    exchange_in_c(tmp_path / "c" / "exchange_c")

    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    where = {"PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    assert run("pkg-config", "--modversion", "asyncdiff", env=where).strip() == VERSION
    flags = shlex.split(run("pkg-config", "--cflags", "--libs", "asyncdiff", env=where))
    run(compiler, "-std=c++17", program, "-o", tmp_path / "program", *flags)
    assert run(tmp_path / "program").split() == [VERSION, VERSION]


def test_pkg_config_from_the_wheel(tmp_path: Path, compiler: str, program: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    where = {"PKG_CONFIG_PATH": core.get_pkgconfig_dir()}
    flags = shlex.split(run("pkg-config", "--cflags", "--libs", "asyncdiff", env=where))
    run(compiler, "-std=c++17", program, "-o", tmp_path / "program", *flags)
    assert run(tmp_path / "program").split() == [VERSION, VERSION]
    if not core.cuda_built():
        return
    toolkit = "--define-variable=cuda=/opt/toolkit"
    out = run("pkg-config", toolkit, "--cflags", "--libs", "asyncdiff_cuda", env=where)
    flags = shlex.split(out)
    assert "-I/opt/toolkit/include" in flags and "-DASYNCDIFF_WITH_CUDA" in flags
    assert flags.index("-lasyncdiff_cuda") < flags.index("-lasyncdiff")


@pytest.mark.slow
def test_shared_library(tmp_path: Path, compiler: str, program: Path) -> None:
    """It has a soname, shows its own names alone, and its errors can be caught outside."""
    build(ROOT, tmp_path / "build", "-DBUILD_SHARED_LIBS=ON", "-DASYNCDIFF_CUDA=off", DEBUG)
    run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "prefix")
    (library,) = (tmp_path / "prefix").rglob(f"libasyncdiff.so.{VERSION}")
    build(EXAMPLE, tmp_path / "example", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    assert "host: 10 bundles" in run(tmp_path / "example" / "exchange")
    build(ROOT / "examples" / "c", tmp_path / "c", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    exchange_in_c(tmp_path / "c" / "exchange_c")

    where = {"PKG_CONFIG_PATH": str(library.parent / "pkgconfig")}
    if shutil.which("pkg-config") is None:
        flags = [f"-I{tmp_path / 'prefix' / 'include'}", f"-L{library.parent}", "-lasyncdiff"]
    else:
        flags = shlex.split(run("pkg-config", "--cflags", "--libs", "asyncdiff", env=where))
    run(compiler, "-std=c++17", program, "-o", tmp_path / "program", *flags)
    out = run(tmp_path / "program", env={"LD_LIBRARY_PATH": str(library.parent)})
    assert out.split() == [VERSION, VERSION]

    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    soname = ".".join(VERSION.split(".")[:2])
    assert f"[libasyncdiff.so.{soname}]" in run("readelf", "-d", library)
    lines = run("readelf", "--dyn-syms", "--wide", library).splitlines()
    shown = {line.split()[-1] for line in lines if " DEFAULT " in line and " UND " not in line}
    for name in ("ExchangeTimeout", "SlotOrderError", "Aborted", "InvalidArgument"):
        assert f"_ZTIN9asyncdiff{len(name)}{name}E" in shown
    assert not [name for name in shown if "HostChannel" in name]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["add_subdirectory", "FetchContent"])
def test_subproject(tmp_path: Path, program: Path, way: str) -> None:
    """At its defaults: no Python, an alias as from find_package, nothing in the parent's prefix."""
    source = ROOT.as_posix()
    include = {
        "add_subdirectory": f'add_subdirectory("{source}" asyncdiff)',
        "FetchContent": "include(FetchContent)\n"
        f'FetchContent_Declare(asyncdiff SOURCE_DIR "{source}")\n'
        "FetchContent_MakeAvailable(asyncdiff)",
    }[way]
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(parent VERSION 9.8 LANGUAGES CXX)\n"
        f"{include}\n"
        "add_executable(program program.cpp)\n"
        "target_link_libraries(program PRIVATE asyncdiff::asyncdiff)\n"
        "install(TARGETS program)\n"
    )
    build(tmp_path, tmp_path / "build", DEBUG, env=without_nvcc())
    assert run(tmp_path / "build" / "program").split() == [VERSION, VERSION]
    run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "prefix")
    assert [p.name for p in (tmp_path / "prefix").rglob("*") if p.is_file()] == ["program"]


def test_source_folder_without_an_extension(tmp_path: Path) -> None:
    """Python finds it first in the repository's root, and says so."""
    package = tmp_path / "asyncdiff_core"
    files = [*(ROOT / "asyncdiff_core").glob("*.py")]
    package.mkdir()
    for file in files:
        shutil.copy(file, package)
    # -S: an editable install knows another place for the extension.
    failed = attempt(sys.executable, "-S", *COMMAND[1:], "--cmakedir", cwd=tmp_path)
    assert failed.returncode != 0
    assert "sources and no extension" in failed.stderr and "pip install -e ." in failed.stderr

    # With the extension beside them, as after a copy: what else an installation has is missing.
    shutil.copy(core._core.__file__, package)
    (tmp_path / "CMakeLists.txt").touch()
    failed = attempt(*COMMAND, "--cmakedir", cwd=tmp_path)
    assert failed.returncode == 2
    (line,) = failed.stderr.splitlines()
    assert "source folder" in line and "another folder" in line
