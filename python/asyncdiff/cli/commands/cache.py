"""``asyncdiff cache show`` and ``clear``: preparations that are kept on the disk."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from typing import Annotated

import typer

from ...errors import InputError
from .. import console
from .. import options as opt

cache = typer.Typer(name="cache", help="Preparations that are kept.", no_args_is_help=True)


@cache.command()
def show(as_json: opt.Json = False) -> None:
    """List what is kept, that which was used last first, where, and where compiled regions are."""
    from ...graph.compiled import stored
    from ...preparation.folder import LIMIT, preparations

    folder = preparations()
    entries = folder.entries()
    total = sum(entry.nbytes for entry in entries)
    compiled = stored.folder()
    of_compiled = stored.nbytes(compiled)
    if as_json:
        console.emit_json(
            {
                "folder": None if folder.path is None else str(folder.path),
                "bytes": total,
                "limit": LIMIT,
                "compiled": {"folder": str(compiled), "bytes": of_compiled},
                "entries": [asdict(entry) for entry in entries],
            }
        )
        return
    out = console.stdout()
    out.print(
        f"inductor's cache, compiled regions in it: {of_compiled / 2**20:.1f} MiB, no limit, "
        f"in {compiled}",
        markup=False,
    )
    if folder.path is None:
        out.print("nothing is kept: ASYNCDIFF_CACHE is off, or there is no home")
        return
    for entry in entries:
        used = datetime.datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        size = f"{entry.nbytes / 1024:.0f} KiB"
        out.print(f"{used}  {entry.kind:<5}  {size:>9}  {entry.of}", markup=False)
    size = f"{total / 2**20:.1f} of at most {LIMIT >> 20} MiB"
    out.print(f"{len(entries)} entries, {size}, in {folder.path}", markup=False)


@cache.command()
def clear(
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Inductor's cache instead, other programs' too.")
    ] = False,
) -> None:
    """Remove all preparations that are kept; the next process prepares anew."""
    if compiled:
        _clear_compiled()
        return
    from ...preparation.folder import preparations

    folder = preparations()
    try:
        count = folder.clear()
    except OSError as error:
        raise InputError(f"cannot clear {folder.path}: {error.strerror or error}") from error
    where = "" if folder.path is None else f" from {folder.path}"
    console.stdout().print(f"removed {count} entries{where}", markup=False)


def _clear_compiled() -> None:
    from ...graph.compiled import stored

    where = stored.folder()
    before = stored.nbytes(where)
    try:
        stored.clear(where)
    except OSError as error:
        raise InputError(f"cannot clear {where}: {error.strerror or error}") from error
    removed = (before - stored.nbytes(where)) / 2**20
    console.stdout().print(f"removed {removed:.1f} MiB from {where}", markup=False)
