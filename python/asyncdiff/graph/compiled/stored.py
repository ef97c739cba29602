"""What inductor keeps on the disk, which compiled pieces are a part of."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

#: Notes of what is compiled, first, so that none is of what is gone; then what is inductor's.
_NAMES = ("asyncdiff", "fxgraph", "aotautograd", "triton", "locks")
#: In its other folders sources lie by their hash, of which these characters are the folder's name.
_HASHED = slice(1, 3)


def folder() -> Path:
    """Inductor's folder, whether it is there or not: ``TORCHINDUCTOR_CACHE_DIR``, or torch's
    default."""
    from torch._inductor.runtime import runtime_utils

    return Path(runtime_utils.cache_dir())  # type: ignore[attr-defined]


def nbytes(where: Path) -> int:
    """Bytes of all files there."""
    total = 0
    for parent, _, names in os.walk(where):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def clear(where: Path) -> None:
    """Remove what inductor and we have there, and nothing else. Raises OSError."""
    for path in list(_own(where)):
        shutil.rmtree(path)


def _own(where: Path) -> Iterator[Path]:
    named = [where / name for name in _NAMES]
    every = list(where.iterdir()) if where.is_dir() else []
    for path in (*named, *(p for p in every if len(p.name) == 2)):
        if path.is_dir() and not path.is_symlink() and (path in named or _by_hash(path)):
            yield path


def _by_hash(path: Path) -> bool:
    inside = [p.name for p in path.iterdir() if p.name != "__pycache__"]
    return all(name[_HASHED] == path.name for name in inside)
