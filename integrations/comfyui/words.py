"""What asyncdiff's errors say, in the words of the node's inputs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from asyncdiff.errors import AsyncDiffError

_NAME = "AsyncDiff parallel"
_SWITCH = {"None": "off", "False": "off", "True": "on"}
#: What no input of the node can ask for, and what others than the node do.
_OTHERS = (
    (", exact_mode='split' and schedule='pipeline'", " and exact_mode='split'"),
    (" (where it guides by a batch of two conditions)", ""),
    ("use ['cpu'] entries", 'name "cpu, cpu"'),
    ("pass guidance_scale > 1 to the pipeline", "take a cfg above 1 in the sampler"),
)
_CHOICE = re.compile(r"\b([a-z_]+)=('[^']*'(?: or '[^']*')*)")
_VALUE = re.compile(r"\b([a-z_]+)=(None|True|False|\d+)\b")


@contextlib.contextmanager
def own_words() -> Iterator[None]:
    """Let errors of asyncdiff say the node's name and inputs, not arguments of Python."""
    try:
        yield
    except AsyncDiffError as e:
        e.args = (said(str(e)), *e.args[1:])
        raise


def said(message: str) -> str:
    """A message of asyncdiff as the node says it."""
    for theirs, ours in _OTHERS:
        message = message.replace(theirs, ours)
    message = _CHOICE.sub(lambda m: f"{m[1]} {m[2]}".replace("'", ""), message)
    message = _VALUE.sub(lambda m: f"{m[1]} {_SWITCH.get(m[2], m[2])}", message)
    return message if message.startswith(_NAME) else f"{_NAME}: {message}"
