"""ComfyUI, where the environment variable COMFYUI names its folder; else all tests here skip
themselves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_FOLDER = os.environ.get("COMFYUI", "")

if _FOLDER:
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from comfyui.loading import load_pack, open_comfyui

    open_comfyui(_FOLDER, cpu=True)
    from tiny_models import sd15


@pytest.fixture(scope="session")
def pack() -> Any:
    """The node pack, loaded as ComfyUI loads it."""
    return load_pack()


@pytest.fixture
def spread(pack: Any) -> Any:
    """The node's function, with every step exact unless settings say otherwise."""

    def run(model: Any, **settings: Any) -> Any:
        exact = {"devices": "cpu, cpu", "schedule": "asyncdiff", "warmup": 1000, "exact_tail": 0}
        return pack.NODE_CLASS_MAPPINGS["AsyncDiffParallel"]().spread(model, **exact | settings)[0]

    return run


@pytest.fixture(autouse=True)
def inference_mode() -> Iterator[None]:
    """ComfyUI runs all nodes in it."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture
def model() -> Any:
    """A MODEL of SD 1.5's layout with tiny widths."""
    return sd15()
