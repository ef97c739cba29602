"""ComfyUI from its folder, and the node pack as ComfyUI loads it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"
#: Packages that ComfyUI imports, of which models and samplers use nothing.
_UNUSED = ("torchvision", "torchaudio")


def open_comfyui(folder: str, cpu: bool) -> None:
    """Make ComfyUI's modules importable from its folder, for a CPU or for GPUs."""
    sys.path.insert(0, folder)
    pretend_unused()
    from comfy.cli_args import args

    args.cpu = cpu
    args.use_pytorch_cross_attention = True  # on CPUs as on GPUs


def pretend_unused() -> None:
    """Let ComfyUI import what is not installed, of which models and samplers use nothing."""
    for name in _UNUSED:
        if importlib.util.find_spec(name) is None:
            _pretend(name)


def load_pack() -> Any:
    """The node pack's module."""
    spec = importlib.util.spec_from_file_location(
        "asyncdiff_comfyui", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None and spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = pack
    spec.loader.exec_module(pack)
    return pack


def _pretend(name: str) -> None:
    """A package that can be imported, with nothing in it."""
    for path in (name, f"{name}.transforms", f"{name}.functional"):
        module = types.ModuleType(path)
        module.__spec__ = importlib.machinery.ModuleSpec(path, None)
        module.__getattr__ = lambda attribute: None  # type: ignore[method-assign]
        sys.modules[path] = module
        parent, _, own = path.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
