"""How much faster real models are with some settings: from times that were measured on GPUs.

A loop is some exact steps and some steady ones; what each takes follows from the measured loops of
other numbers of exact steps in ``denoise_4gpu.json``. The steps of waves take what those of the
published schedule take (both were measured: they differ by less than 1 %).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import torch

import results_file
from asyncdiff.config import ParallelConfig
from asyncdiff.generation.spec import GenerationSpec

RESULTS = results_file.ROOT / "benchmarks" / "results" / "denoise_4gpu.json"
#: The models whose loops are used, each in one CUDA graph a rank.
MODELS = ("sdxl", "sd3", "flux")


def speedup(settings: Mapping[str, Any], steps: int) -> dict[str, float]:
    """Of what a quality picked (arguments of ``asyncdiff.ParallelConfig``), by model: one GPU's
    loop over this one. Models of which a loop that it takes was not measured are left out."""
    found = {}
    for model in MODELS:
        try:
            found[model] = round(_plain(model) * steps / _loop(model, settings, steps), 2)
        except KeyError:
            continue
    return found


def _loop(model: str, settings: Mapping[str, Any], steps: int) -> float:
    """Milliseconds of a generation. Raises KeyError where a loop was not measured."""
    split = settings.get("guidance") == "split"
    components = settings["components"]
    if components == 1:
        return steps * (_ms(model, "N=1 S=1 w=1 split") if split else _plain(model))
    name = f"N={components} S=1 w={{}}" + (" split" if split else "")
    length = _steps(model)
    one, nine = (length * _ms(model, name.format(w)) for w in (1, 9))
    exact = (nine - one) / 8 + (one - (nine - one) / 8) / length
    steady = (one - exact) / (length - 1)
    exactly = settings["warmup"] + settings["exact_tail"]
    total = exactly * exact + (steps - exactly) * steady
    if settings["exact_mode"] == "split" and not split:
        total += split_steps(settings) * (_ms(model, "N=1 S=1 w=1 split") - exact)
    return total


def split_steps(settings: Mapping[str, Any]) -> int:
    """How many steps of waves run split, a condition on each of two devices, with
    ``exact_mode="split"``."""
    config = ParallelConfig(**settings, devices=["cpu"] * settings["components"])
    return sum(GenerationSpec.of(config, torch.zeros(1000)).split_steps)


@functools.cache
def _figures() -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(RESULTS.read_text())["figures"]
    return figures


def _steps(model: str) -> int:
    return int(_figures()[model]["steps"])


def _ms(model: str, loop: str) -> float:
    return float(_figures()[model][loop]["ms_a_step"]["median"])


def _plain(model: str) -> float:
    return _ms(model, "graph")
