"""Attributes of objects replaced for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def replacing() -> Iterator[Callable[[Any, str, Any], None]]:
    """Gives ``replace(owner, name, value)``, which sets an attribute on the object itself.

    At the end, also after an exception, every object is as it was: what it had of its own comes
    back (accelerate's hooks put a ``forward`` on a module), what its class has shows again.
    """
    with contextlib.ExitStack() as undo:

        def replace(owner: Any, name: str, value: Any) -> None:
            # Straight in __dict__: a module's own setattr sorts what it is given.
            if name in owner.__dict__:
                undo.callback(owner.__dict__.__setitem__, name, owner.__dict__[name])
            else:
                undo.callback(owner.__dict__.pop, name, None)
            owner.__dict__[name] = value

        yield replace
