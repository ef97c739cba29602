"""Where Python finds NCCL. What the core makes of it is tested in C++."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from asyncdiff_core import nccl


@pytest.fixture
def nvidia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package that wheels of NVIDIA share, a namespace, with nothing in it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path / "nvidia"


def test_it_is_found_in_a_wheel(nvidia: Path) -> None:
    assert nccl.wheel_library() is None
    (nvidia / "cublas" / "lib").mkdir(parents=True)
    sys.path_importer_cache.clear()
    assert nccl.wheel_library() is None
    lib = nvidia / "nccl" / "lib"
    lib.mkdir(parents=True)
    sys.path_importer_cache.clear()
    assert nccl.wheel_library() is None  # the wheel has been taken away
    (lib / "libnccl.so.2").touch()
    assert nccl.wheel_library() == lib / "libnccl.so.2"


def test_the_core_is_told(nvidia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(nccl._core, "set_nccl_path", told.append, raising=False)
    nccl.find_in_wheel()
    assert told == []
    (nvidia / "nccl" / "lib").mkdir(parents=True)
    (nvidia / "nccl" / "lib" / "libnccl.so.2").touch()
    sys.path_importer_cache.clear()
    nccl.find_in_wheel()
    assert told == [str(nvidia / "nccl" / "lib" / "libnccl.so.2")]
