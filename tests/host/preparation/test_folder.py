"""Entries on the disk: what is damaged, foreign, or of another version costs a line, and a disk
that is full or read-only, too."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest

from asyncdiff.preparation import folder as module
from asyncdiff.preparation.folder import Folder, preparations
from asyncdiff.turns import alone

CONTENT = {"cuts": ["relu_2"], "ms": [0.1, 1e-9]}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "cache" / "preparations")
    made.write("cuts", "abc", "a toy", CONTENT)
    return made


def said(caplog: pytest.LogCaptureFixture) -> str:
    (record,) = caplog.records
    caplog.clear()
    return record.getMessage()


def test_what_was_written_is_read(folder: Folder) -> None:
    assert folder.path is not None and folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.file("cuts", "abc").stat().st_mode & 0o777 == 0o600
    assert folder.read("cuts", "abc") == Folder(folder.path).read("cuts", "abc") == CONTENT
    assert folder.read("cuts", "other") is folder.read("graph", "abc") is None
    (entry,) = folder.entries()
    assert (entry.kind, entry.key, entry.of) == ("cuts", "abc", "a toy")
    assert folder.clear() == 1 and not folder.entries() and not list(folder.path.iterdir())


def _damage(data: bytes) -> bytes:
    return data[:-3] + b"abc"


def _cut_off(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _other_version(data: bytes) -> bytes:
    head, _, rest = data.partition(b"\n")
    written = json.loads(head) | {"asyncdiff preparation": 99}
    return json.dumps(written).encode() + b"\n" + rest


def _other_key(data: bytes) -> bytes:
    return data.replace(b'"abc"', b'"xyz"')


def _foreign(data: bytes) -> bytes:
    return b"\x80\x04\x95 a pickle, say"


def _nested(data: bytes) -> bytes:
    packed = zlib.compress(b"[" * 100_000)
    head = json.loads(data.partition(b"\n")[0]) | {"sha256": hashlib.sha256(packed).hexdigest()}
    return json.dumps(head).encode() + b"\n" + packed


@pytest.mark.parametrize(
    "change,why",
    [
        (_damage, "damaged"),
        (_cut_off, "damaged"),
        (_other_version, "another version (99, not 1)"),
        (_other_key, "something else"),
        (_foreign, "damaged"),
        (lambda data: b"", "damaged"),
        (lambda data: b"[" * 100_000, "damaged"),
        (_nested, "damaged"),
    ],
)
def test_what_is_not_right_is_ignored_with_a_line(
    folder: Folder, caplog: pytest.LogCaptureFixture, change: Any, why: str
) -> None:
    path = folder.file("cuts", "abc")
    path.write_bytes(change(path.read_bytes()))
    for _ in range(2):
        assert folder.read("cuts", "abc") is None
    assert why in said(caplog)
    folder.write("cuts", "abc", "a toy", CONTENT)  # and made anew
    assert folder.read("cuts", "abc") == CONTENT


def test_what_others_could_have_written_is_ignored(
    folder: Folder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.file("cuts", "abc")
    path.chmod(0o666)
    assert folder.read("cuts", "abc") is None
    assert "others could have written it" in said(caplog)
    path.chmod(0o600)
    there = path.with_name("elsewhere")
    path.rename(there)
    path.symlink_to(there)
    assert folder.read("cuts", "abc") is None
    assert said(caplog)
    assert folder.path is not None
    folder.path.chmod(0o777)
    assert folder.read("cuts", "nothing") is None
    assert folder.path.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(module.os, "geteuid", lambda: os.getuid() + 1)
    assert folder.read("cuts", "abc") is None
    assert "another user's" in said(caplog)


def test_a_full_disk_costs_a_line(
    folder: Folder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.fdopen

    class Full:
        def __init__(self, handle: int) -> None:
            self.file = plain(handle, "wb")

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(
            module.os, "fdopen", lambda h, mode: Full(h) if mode == "wb" else plain(h, mode)
        )
        folder.write("cuts", "new", "a toy", CONTENT)
        folder.write("cuts", "abc", "a toy", {})
    assert "No space left on device" in said(caplog)
    assert folder.read("cuts", "abc") == CONTENT and folder.read("cuts", "new") is None
    assert folder.path is not None and len(list(folder.path.iterdir())) == 1


def test_a_home_that_is_read_only_costs_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for where in ("/proc/nowhere", str(tmp_path / "file")):
        monkeypatch.setenv("ASYNCDIFF_CACHE", where)
        for _ in range(2):
            preparations().write("cuts", "abc", "a toy", CONTENT)
            assert preparations().read("cuts", "abc") is None
        assert where in said(caplog)


def test_a_folder_that_is_read_only_serves(
    folder: Folder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the image of a container."""

    def refused(*args: Any, **options: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "utime", refused)
        patch.setattr(module.tempfile, "mkstemp", refused)
        assert folder.read("cuts", "abc") == CONTENT and not caplog.records
        folder.write("cuts", "new", "a toy", CONTENT)
        with alone(folder.turn("cuts", "abc")):
            assert folder.read("cuts", "abc") == CONTENT
    assert "Read-only file system" in said(caplog)


def test_the_environment_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASYNCDIFF_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert preparations().path == tmp_path / ".cache" / "asyncdiff" / "preparations"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert preparations().path == tmp_path / "xdg" / "asyncdiff" / "preparations"
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path / "own"))
    assert preparations().path == tmp_path / "own" / "preparations"
    monkeypatch.setenv("ASYNCDIFF_CACHE", "off")
    assert preparations().path is None and not preparations().usable()


def test_what_was_used_longest_ago_makes_room(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    noise = os.urandom(2000).hex()
    size = 0
    for age, key in ((300, "a"), (200, "b"), (100, "c")):
        folder.write("graph", key, "", [noise, key])
        path = folder.file("graph", key)
        size = path.stat().st_size
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    folder.read("graph", "a")  # used now
    unfinished = folder.file("graph", "d").with_suffix(".part")
    unfinished.write_bytes(b"")
    os.utime(unfinished, (0, 0))
    monkeypatch.setattr(module, "LIMIT", 3 * size + 500)
    folder.write("graph", "d", "", [noise, "d"])
    assert {e.key for e in folder.entries()} == {"abc", "a", "c", "d"}
    assert not unfinished.exists() and not caplog.records
