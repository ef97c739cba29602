"""``asyncdiff doctor``: what this machine has, what will be used, and why not the rest."""

from __future__ import annotations

from .. import console
from .. import options as opt


def doctor(as_json: opt.Json = False) -> None:
    """Look at versions, GPUs and the links between them (peer access is really tried)."""
    from ...tools.doctor import collect, tell

    with console.progress() as bar:
        task = bar.add_task("looking", total=4)
        found = collect(lambda: bar.advance(task))
    if as_json:
        console.emit_json(found)
    else:
        console.stdout().print(tell(found), markup=False)
