"""What the build promises: no driver needed to import, and ASYNCDIFF_CUDA obeyed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import asyncdiff
import asyncdiff_core as core

ROOT = Path(__file__).parents[3]


def configure(
    folder: Path, setting: str, hide_nvcc: bool = True
) -> subprocess.CompletedProcess[str]:
    """CMake, by default on a PATH without nvcc."""
    cmake = shutil.which("cmake")
    assert cmake is not None
    env = os.environ | {"ASYNCDIFF_CUDA": setting}
    if hide_nvcc:
        if Path("/usr/bin/nvcc").exists():
            pytest.skip("nvcc lies in /usr/bin and cannot be hidden")
        for name in ("CUDACXX", "CUDA_PATH", "CUDA_HOME"):
            env.pop(name, None)
        env["PATH"] = "/usr/bin:/bin"
    pybind = subprocess.check_output(
        [sys.executable, "-m", "pybind11", "--cmakedir"], text=True
    ).strip()
    options = [f"-Dpybind11_DIR={pybind}", f"-DPython_EXECUTABLE={sys.executable}"]
    command = [cmake, "-S", str(ROOT), "-B", str(folder), *options]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(autouse=True)
def sources() -> None:
    pytest.importorskip("pybind11", reason="the build's own packages are not installed")
    if not (ROOT / "CMakeLists.txt").exists() or shutil.which("cmake") is None:
        pytest.skip("no sources or no CMake here")


def test_cuda_on_fails_loudly_without_nvcc(tmp_path: Path) -> None:
    done = configure(tmp_path, "on")
    assert done.returncode != 0
    assert "nvcc was not found" in done.stderr


def test_cuda_auto_builds_for_the_host_without_nvcc(tmp_path: Path) -> None:
    done = configure(tmp_path, "auto")
    assert done.returncode == 0, done.stderr
    assert "building for the host only" in done.stdout


def test_cuda_off_leaves_nvcc_alone(tmp_path: Path) -> None:
    done = configure(tmp_path, "off", hide_nvcc=False)
    assert done.returncode == 0, done.stderr
    assert "ASYNCDIFF_CUDA=off: building for the host only" in done.stdout
    assert "CUDA compiler" not in done.stdout


def test_cuda_setting_is_checked(tmp_path: Path) -> None:
    done = configure(tmp_path, "perhaps")
    assert done.returncode != 0
    assert "choose auto, on or off" in done.stderr


def test_there_is_one_version(tmp_path: Path) -> None:
    """pyproject.toml's, in Python as in CMake."""
    text = (ROOT / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.*)"$', text, re.MULTILINE)
    assert core.build_info()["version"] == asyncdiff.__version__ == version
    done = configure(tmp_path, "off", hide_nvcc=False)
    assert done.returncode == 0, done.stderr
    cache = (tmp_path / "CMakeCache.txt").read_text()
    assert f"CMAKE_PROJECT_VERSION:STATIC={version}" in cache
    # As find_package reads it.
    package = (tmp_path / "install" / "asyncdiff_core-config-version.cmake").read_text()
    assert f'set(PACKAGE_VERSION "{version}")' in package


def test_the_extension_needs_no_driver() -> None:
    info = core.build_info()
    assert {"version", "compiler"} <= set(info)
    assert core.cuda_built() == ("cuda" in info)
    extension = core._core.__file__
    needed = subprocess.run(["ldd", extension], capture_output=True, text=True).stdout
    assert "libcuda" not in needed
    assert "libtorch" not in needed


def test_the_extension_shows_no_runtime_library_of_its_own() -> None:
    """Two visible copies of the C++ standard library in one process crash."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    symbols = subprocess.check_output(["nm", "-D", core._core.__file__], text=True)
    defined = [
        line.split()[-1] for line in symbols.splitlines() if not {"U", "w"} & set(line.split()[:-1])
    ]
    assert "PyInit__core" in defined
    assert not [s for s in defined if s.startswith(("__cxa_", "cuda", "__cuda"))]


def from_pypi(**env: str) -> list[str]:
    """What the build would install, on a PATH without nvcc unless ``env`` says otherwise."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith("CUDA")}
    kept = kept | {"PATH": "/usr/bin:/bin"} | env
    script = ROOT / "csrc" / "packaging" / "pypi_cuda.py"
    return subprocess.check_output([sys.executable, script], text=True, env=kept).split()


def fake_driver(folder: Path, version: int) -> str:
    """A folder with a libcuda that supports that CUDA: 13000 is 13.0."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    source = folder / "cuda.c"
    source.write_text(f"int cuDriverGetVersion(int *v) {{ *v = {version}; return 0; }}")
    run = [compiler, "-shared", "-fPIC", source, "-o", folder / "libcuda.so.1"]
    subprocess.run(run, check=True)
    return str(folder)


def test_the_compiler_comes_from_pypi_where_a_driver_can_use_it(tmp_path: Path) -> None:
    if Path("/usr/bin/nvcc").exists():
        pytest.skip("nvcc lies in /usr/bin and cannot be hidden")
    driver = fake_driver(tmp_path, 13010)
    wanted = from_pypi(LD_LIBRARY_PATH=driver)
    assert "nvidia-cuda-nvcc==13.0.*" in wanted and "nvidia-cuda-runtime==13.0.*" in wanted
    assert from_pypi(ASYNCDIFF_CUDA="on") == wanted
    assert from_pypi(LD_LIBRARY_PATH=driver, ASYNCDIFF_CUDA="off") == []
    older = tmp_path / "older"
    older.mkdir()
    assert from_pypi(LD_LIBRARY_PATH=fake_driver(older, 12040)) == []


def test_an_installed_compiler_is_taken(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.touch(mode=0o755)
    assert from_pypi(ASYNCDIFF_CUDA="on", PATH=f"{tmp_path}:/usr/bin:/bin") == []
    assert from_pypi(ASYNCDIFF_CUDA="on", CUDACXX=str(nvcc)) == []


def test_the_licenses_are_named_and_there() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'license = "Apache-2.0"' in text
    (names,) = re.findall(r"^license-files = \[(.*)\]$", text, re.MULTILINE)
    for pattern in re.findall(r'"(.*?)"', names):
        assert list(ROOT.glob(pattern)), pattern
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
