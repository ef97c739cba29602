"""What inductor keeps on the disk, which compiled pieces are a part of."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

#: Notes of what is compiled, first, so that none is of what is gone; then what is inductor's.
_NAMES = ("asyncdiff", "fxgraph", "aotautograd", "triton", "locks")
#: Characters of the names of its other folders, which sources lie in by their hash.
_HASHED = 2


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
    hashed = [p for p in where.glob("*") if len(p.name) == _HASHED] if where.is_dir() else []
    for path in (*named, *hashed):
        if path.is_dir() and not path.is_symlink():
            yield path
