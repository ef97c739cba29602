"""Settings as flags of the command line and as arguments of Python, and one in words of the other.

Errors of the library speak of its arguments (``exact_tail=3``); whoever typed ``--exact-tail 3``
reads that instead.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

#: Arguments whose flag has another name, or none: what stands for which of their values.
_SPECIAL = {
    ("guidance", "split"): "--split-guidance",
    ("guidance", "batched"): "no --split-guidance",
    ("compile", "True"): "--compile",
    ("compile", "regions"): "--compile",
    ("compile", "whole"): "--compile-whole",
    ("compile", "False"): "--no-compile",
    ("time_shift", "True"): "--time-shift",
    ("time_shift", "False"): "no --time-shift",
    ("order", "None"): "no --order",
    ("delay", "None"): "no --delay",
}
#: Arguments that options of single commands stand for.
_OTHERS = {
    "devices": "--devices",
    "quality": "--quality",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "sampler": "--sampler",
    "dtype": "--dtype",
    "seed": "--seed",
    "negative_prompt": "--negative",
    "height": "--height",
    "width": "--width",
    "psnr_db": "--psnr",
    "max_lpips": "--lpips",
    "calibrate_on": "--calibrate-on",
    "prompts": "--prompt",
    "ranks": "--ranks",
    "speeds": "--speeds",
    "memory": "--max-memory",
    "compress": "--compress",
}
#: Those of them that errors begin with.
_OF_CARDS = ("speeds", "memory")
#: What is said of Python objects, and what it is called here.
_PHRASES = (
    (r"\bcall calibrate\(\) with", "run `asyncdiff calibrate` with"),
    (r"\bmake one with calibrate\(\)", "make one with `asyncdiff calibrate`"),
    (r"\btune\(\) needs prompts", "tune needs prompts"),
    (r"asyncdiff\.demo\.known_prompts\(\)", "`asyncdiff demo --list`"),
    (r"\ba Calibration, or None", "or a file of `asyncdiff calibrate`"),
    (r"; None takes what measured best", "; without --delay, what measured best is taken"),
    (r": leave it at None", ": leave it out"),
    (r"\bwarmup <= (\d+) \(warmup = steps runs", r"--warmup \1 or less (\1 runs"),
    (r"\bexact_tail <= (\d+)", r"--exact-tail \1 or less"),
    (r"\bcomponents \+ stride - 1\b", "--components + --stride - 1"),
    (r"2 x components\b", "2 x --components"),
    (r"\bcomponents >= 2 or stride >= 2", "--components or --stride of 2"),
    (
        r" \(entries may repeat, as in \['([^']+)'\] \* \d+\)",
        r" (they may repeat; \1 alone is all)",
    ),
    (r"\buse \['cpu'\] entries", "use --devices cpu"),
    (r"\bdevices (asks|mixes)\b", r"--devices \1"),
    (r"\b(move the pipeline there first \(pipe\.to\([^)]*\)\), or )", ""),
    (r"\byour own loop", "a loop of your own in Python"),
    (r"\bheight and width (?=are)", "--height and --width "),
)


@functools.cache
def flags() -> dict[str, str]:
    """The long flag of every setting, by the argument of :func:`asyncdiff.parallelize`."""
    from .option_groups import option_of
    from .options import Setting

    return {f.name: option_of(Setting, f.name) for f in fields(Setting)} | _OTHERS


def in_flags(text: str) -> str:
    """An error's text in the terms of the command line."""
    for pattern, instead in _PHRASES:
        text = re.sub(pattern, instead, text)
    names = "|".join({*flags(), *(name for name, _ in _SPECIAL)})
    value = r"'[^']*'|\"[^\"]*\"|[\w.+-]*[\w]"
    text = re.sub(rf"(?<![\w.-])({names})=({value})", _flag, text)
    # A name alone, where the sentence is about the argument: what an error begins with.
    alone = "|".join(name for name in flags() if name not in _OTHERS or name in _OF_CARDS)
    return re.sub(rf"^({alone})(?= (?:must|belongs|needs|has)\b)", _name, text)


def _flag(found: re.Match[str]) -> str:
    name, value = found[1], found[2].strip("'\"")
    if (name, value) in _SPECIAL:
        return _SPECIAL[name, value]
    return f"{flags()[name]} {value}" if name in flags() else found[0]


def _name(found: re.Match[str]) -> str:
    return flags()[found[1]]


def as_python(arguments: Mapping[str, Any]) -> str:
    """The call of :func:`asyncdiff.parallelize` with these arguments; a calibration stands as the
    call that loads it from ``order``, if that is a path."""
    shown = ", ".join(
        f"{k}={v!r}" if k != "order" or not isinstance(v, str) else f"{k}=Calibration.load({v!r})"
        for k, v in arguments.items()
        if v is not None
    )
    return f"asyncdiff.parallelize(pipe, {shown})"


def as_flags(arguments: Mapping[str, Any]) -> str:
    """The same for ``asyncdiff generate``."""
    words: list[str] = []
    for name, value in arguments.items():
        if value is None or (name not in flags() and (name, str(value)) not in _SPECIAL):
            continue
        if (name, str(value)) in _SPECIAL:
            flag = _SPECIAL[name, str(value)]
            words += [] if flag.startswith("no ") else [flag]
        elif isinstance(value, (list, tuple)):
            words += [flags()[name], ",".join(map(str, value))]
        else:
            words += [flags()[name], str(value)]
    return shlex.join(words)
