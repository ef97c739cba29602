"""A private folder of entries on the disk: small files that are checked when they are read.

An entry is a line of JSON, which says what it is and what its content hashes to, and the content,
which is compressed JSON too: nothing that is read here can run. Whatever is wrong with the folder
or an entry costs one logged line and the time that the entry would have saved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..environment import cache_folder

log = logging.getLogger("asyncdiff")

#: Of the form of entries. Others are ignored.
VERSION = 1
#: Bytes that all entries may take together; those used longest ago go first.
LIMIT = 256 << 20
#: Bytes of an entry's content at most, written out: a larger one is none of ours.
_LARGEST = 256 << 20
_SUFFIX, _UNFINISHED, _TURN = ".entry", ".part", ".lock"
#: Seconds after which a file that was never finished is nobody's.
_FORGOTTEN = 3600.0


@dataclass(frozen=True)
class Entry:
    """What there is of an entry without reading it: its key and kind, what it is of, bytes, and
    when it was used last (seconds since 1970)."""

    key: str
    kind: str
    of: str
    nbytes: int
    used: float


class Folder:
    """Entries at ``path``, which is made when it is needed; None: nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._said: set[str] = set()

    def read(self, kind: str, key: str) -> Any:
        """The content of an entry; None where there is none that can be trusted."""
        if not self.usable():
            return None
        where = self.file(kind, key)
        try:
            data = _read(where)
            content = _content(data, kind, key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            self.say(f"a preparation on the disk is ignored, {where}: {e}")
            return None
        with contextlib.suppress(OSError):  # one that is read-only serves, too
            os.utime(where)
        return content

    def write(self, kind: str, key: str, of: str, content: Any) -> None:
        """Keep an entry, in the place of the one that there is. ``of``: what it is of, for
        people."""
        if not self.usable():
            return
        where = self.file(kind, key)
        packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 1)
        head = {
            "asyncdiff preparation": VERSION,
            "kind": kind,
            "key": key,
            "of": of,
            "sha256": hashlib.sha256(packed).hexdigest(),
        }
        data = json.dumps(head).encode() + b"\n" + packed
        try:
            self._make_room(len(data))
            _replace(where, data)
        except OSError as e:
            self.say(f"a preparation is not kept on the disk, {where.parent}: {e.strerror or e}")

    def file(self, kind: str, key: str) -> Path:
        """Where an entry is."""
        assert self.path is not None
        return self.path / f"{kind}-{key}{_SUFFIX}"

    def turn(self, kind: str, key: str) -> Path | None:
        """Where who makes an entry says so (see :mod:`~asyncdiff.turns`); None: nothing is kept."""
        return self.file(kind, key).with_suffix(_TURN) if self.usable() else None

    def entries(self) -> list[Entry]:
        """What there is, that which was used last first."""
        found = []
        for path, about in self._files():
            with contextlib.suppress(OSError, ValueError, KeyError):
                head = _head(_read(path).partition(b"\n")[0])
                key, kind, of = (str(head[n]) for n in ("key", "kind", "of"))
                found.append(Entry(key, kind, of, about.st_size, about.st_mtime))
        return sorted(found, key=lambda e: -e.used)

    def clear(self) -> int:
        """Remove everything; how many entries that was. Raises OSError."""
        count = 0
        for path, _ in self._files():
            path.unlink(missing_ok=True)
            count += 1
        for path in self._others():
            path.unlink(missing_ok=True)
        return count

    def usable(self) -> bool:
        """Whether the folder is there, and nobody else can write to it; it is made at first."""
        if self.path is None:
            return False
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = self.path.lstat()
        except OSError as e:
            return self.say(f"nothing is kept of preparations, {self.path}: {e.strerror or e}")
        if not stat.S_ISDIR(about.st_mode):
            return self.say(f"nothing is kept of preparations: {self.path} is no folder")
        if about.st_uid != os.geteuid():
            return self.say(f"nothing is kept of preparations: {self.path} is another user's")
        if about.st_mode & 0o077:
            try:
                self.path.chmod(0o700)
            except OSError as e:
                return self.say(f"nothing is kept of preparations, {self.path}: {e.strerror}")
        return True

    def say(self, line: str) -> bool:
        """Log a line once. False."""
        if line not in self._said:
            self._said.add(line)
            log.warning("%s", line)
        return False

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        if self.path is None or not self.path.is_dir():
            return
        for path in sorted(self.path.glob(f"*{_SUFFIX}")):
            with contextlib.suppress(OSError):
                about = path.lstat()
                if stat.S_ISREG(about.st_mode):
                    yield path, about

    def _others(self) -> Iterator[Path]:
        """Files that were never finished, and locks."""
        if self.path is not None and self.path.is_dir():
            for suffix in (_UNFINISHED, _TURN):
                yield from self.path.glob(f"*{suffix}")

    def _make_room(self, nbytes: int) -> None:
        """Remove what was used longest ago, until so many bytes more are within the limit; and what
        was never finished."""
        assert self.path is not None
        found = sorted(self._files(), key=lambda f: f[1].st_mtime)
        total = nbytes + sum(about.st_size for _, about in found)
        for path, about in found:
            if total <= LIMIT:
                break
            path.unlink(missing_ok=True)
            total -= about.st_size
        now = self.path.stat().st_mtime
        for path in self._others():
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < now - _FORGOTTEN:
                    path.unlink()


def preparations() -> Folder:
    """The folder that the environment says, for this process."""
    base = cache_folder()
    path = None if base is None else base / "preparations"
    if path not in _folders:
        _folders[path] = Folder(path)
    return _folders[path]


#: by path, so that what is wrong with one is said once
_folders: dict[Path | None, Folder] = {}


def _read(path: Path) -> bytes:
    """A file's bytes. Raises OSError; ValueError where it is not this user's own."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(file.fileno())
        if about.st_uid != os.geteuid() or about.st_mode & 0o022:
            raise ValueError("others could have written it")
        if about.st_size > _LARGEST:
            raise ValueError("it is too large")
        return file.read()


def _head(line: bytes) -> dict[str, Any]:
    """What an entry says of itself. Raises ValueError where it is none of this version."""
    try:
        head: dict[str, Any] = json.loads(line)
        version = head["asyncdiff preparation"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError("it is damaged") from None
    if version != VERSION:
        raise ValueError(f"it is of another version ({version}, not {VERSION})")
    return head


def _content(data: bytes, kind: str, key: str) -> Any:
    line, _, packed = data.partition(b"\n")
    head = _head(line)
    if (head.get("kind"), head.get("key")) != (kind, key):
        raise ValueError("it is of something else")
    if head.get("sha256") != hashlib.sha256(packed).hexdigest():
        raise ValueError("it is damaged")
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(packed, _LARGEST)
    except zlib.error:
        raise ValueError("it is damaged") from None
    if not unpack.eof:
        raise ValueError("it is too large")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is damaged") from None


def _replace(where: Path, data: bytes) -> None:
    """Write a file at once: readers see what there was before, or all of it."""
    handle, name = tempfile.mkstemp(_UNFINISHED, where.stem, where.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, where)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
