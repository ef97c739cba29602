"""ComfyUI, where the environment variable COMFYUI names its folder; else all tests here skip
themselves."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
_FOLDER = os.environ.get("COMFYUI", "")

if _FOLDER:
    sys.path.insert(0, _FOLDER)
    from comfy.cli_args import args

    args.cpu = True
    args.use_pytorch_cross_attention = True  # as on GPUs

    from tiny_models import sd15


@pytest.fixture(scope="session")
def pack() -> Any:
    """The node pack, loaded as ComfyUI loads it."""
    spec = importlib.util.spec_from_file_location(
        "asyncdiff_comfyui", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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
