"""What is sent: bundles of a given size, bundles of published denoisers, and their memory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import asyncdiff_core as core
from asyncdiff.runtime.exchange.buffers import tensors_in

from .errors import BenchError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
#: Written by benchmarks/exchange/bundles.py.
_MODELS = Path(__file__).with_name("bundles.json")


@dataclass(frozen=True)
class Payload:
    """A bundle by name, and its tensors."""

    name: str
    specs: tuple[core.TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(s.nbytes for s in self.specs)

    @property
    def layout(self) -> core.Layout:
        """How the bundle lies in a slot."""
        return core.Layout(list(self.specs))

    def memory(self, device: torch.device) -> Memory:
        """Memory of one such bundle, not initialised."""
        layout = self.layout
        raw = torch.empty(max(layout.nbytes, 1), dtype=torch.uint8, device=device)
        return Memory(raw, layout)


class Memory:
    """A bundle's tensors in one piece of memory.

    ``tensors`` have the shapes and strides of the layout, ``raw`` are the same as flat bytes.
    """

    def __init__(self, memory: torch.Tensor, layout: core.Layout) -> None:
        self._memory = memory
        self.tensors = tensors_in(memory, layout)
        parts = zip(layout.specs, layout.offsets, strict=True)
        self.raw = [memory[o : o + s.nbytes] for s, o in parts]

    def fill(self, seed: int) -> None:
        """Bytes that only ``seed`` decides: the same on all devices of one kind."""
        generator = torch.Generator(self._memory.device).manual_seed(seed)
        self._memory.random_(0, 256, generator=generator)

    def equals(self, other: Memory) -> bool:
        """Whether all tensors hold the same bytes; padding between them may differ."""
        return all(torch.equal(a, b) for a, b in zip(self.raw, other.raw, strict=True))


def of_size(nbytes: int) -> Payload:
    """One tensor of ``nbytes``."""
    return Payload(size_text(nbytes), (core.TensorSpec("uint8", (nbytes,)),))


def of_model(name: str) -> Payload:
    """A bundle that a denoiser produces; raises BenchError, with the known names, for others."""
    known = models()
    if name not in known:
        raise BenchError(f"bundle {name!r} is unknown; known are {', '.join(known)}")
    return known[name]


@cache
def models() -> dict[str, Payload]:
    """By name: bundles of published denoisers, and 18 tensors of 256 KB."""
    out = {"18x256K": Payload("18x256K", (core.TensorSpec("uint8", (256 << 10,)),) * 18)}
    stored: dict[str, list[dict[str, Any]]] = json.loads(_MODELS.read_text())
    for name, tensors in stored.items():
        specs = [core.TensorSpec(t["dtype"], t["shape"], t["strides"]) for t in tensors]
        out[name] = Payload(name, tuple(specs))
    return out


def read_sizes(text: str) -> tuple[int, ...]:
    """``16K,1M`` in bytes (K = 1024). Raises BenchError."""
    out = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)([KMG]?)B?", part.strip().upper())
        size = int(found[1]) * _UNITS[found[2]] if found else 0
        if not 1 <= size <= 4 << 30:
            raise BenchError(f"size {part.strip()!r}: write 16K, 1M or bytes, up to 4G")
        out.append(size)
    return tuple(out)


def size_text(nbytes: int) -> str:
    """``65536`` as ``64K``; sizes that are no multiple of a unit in bytes."""
    for unit in ("G", "M", "K"):
        if nbytes and nbytes % _UNITS[unit] == 0:
            return f"{nbytes // _UNITS[unit]}{unit}"
    return str(nbytes)
