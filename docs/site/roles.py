"""Docstrings as the site reads them: Markdown, where ours have Sphinx's roles and code marks."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?\.*([^`]+)`")


def markdown(text: str) -> str:
    """``:class:`Plan``` as code, ``like this::`` as a sentence before its code."""
    return re.sub(r"::$", ":", _ROLE.sub(r"`\1`", text), flags=re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
