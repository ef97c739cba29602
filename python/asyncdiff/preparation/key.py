"""Under which word a preparation is kept: of all that it depends on."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..graph.signature import Call
from .identity import UnknownError, digest, of_denoiser

#: Packages that say what is exported, and how.
_PACKAGES = ("asyncdiff", "torch", "diffusers", "transformers", "peft", "accelerate")
#: Our own code that makes graphs and cuts, which changes within a version.
_OURS = ("graph", "partition", "preparation")


def of_graph(module: nn.Module, call: Call) -> str:
    """The word for the graph of a denoiser and a call. Raises UnknownError where there is none."""
    signature = call.signature
    inputs = [(x.name, x.role.value, x.shape, str(x.dtype)) for x in signature.inputs]
    leaves = [x.__name__ if isinstance(x, type) else _plain(x) for x in call.leaves]
    constants = [(name, _plain(x)) for name, x in signature.constants]
    home = next((str(p.device) for p in module.parameters()), "cpu")
    said = [inputs, constants, signature.tree, leaves, call.names, home]
    return digest([*said, of_denoiser(module), versions()])


def of_cuts(
    graph: str, devices: Sequence[torch.device], units: Sequence[str], settings: Sequence[Any]
) -> str:
    """The word for how a graph is cut for ranks on ``units`` of hardware, of which ``devices`` are
    those of this process, with these ``settings``."""
    where = [(d.type, of_device(d)) for d in devices]
    # Which of them share a unit decides, too, not what it is called.
    shared = [list(units).index(u) for u in units]
    return digest([graph, where, shared, list(settings), versions()])


def of_device(device: torch.device) -> str:
    """What a device is called, and what computes on it."""
    if device.type != "cuda":
        kind = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()} {kind}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.total_memory} {torch.backends.cudnn.version()}"


@cache
def versions() -> str:
    """Of all that makes a graph, in words."""
    found = [f"{name} {_version(name)}" for name in _PACKAGES]
    cuda = torch.version.cuda or torch.version.hip or "none"
    found += [
        f"torch itself {torch.__version__}",
        f"CUDA {cuda}",
        f"Python {platform.python_version()}",
    ]
    return ", ".join([*found, f"our code {_own_code()}"])


def _own_code() -> str:
    root = Path(__file__).parents[1]
    found = hashlib.blake2b(digest_size=8)
    for package in _OURS:
        for path in sorted((root / package).rglob("*.py")):
            found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return found.hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _plain(value: Any) -> Any:
    """A constant argument, with its kind: 1, 1.0 and True are three."""
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [_plain(x) for x in value]
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value).__name__, str(value)
    raise UnknownError(f"a {type(value).__name__} among the arguments")
