"""Weights of a denoiser in safetensors files, read one by one, by name.

They are read, not mapped: what lies in a mapped file counts as memory of each process.
Format: https://huggingface.co/docs/safetensors (a header in JSON behind its length, then bytes).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import InputError

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
#: Bytes of a header, as the format has it.
_LONGEST = 100_000_000
#: Bytes at the beginning of each weight that tell checkpoints apart.
_SAMPLE = 64


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


class Checkpoint:
    """The tensors at ``path``: a file, or a folder with one or with an index of several, as
    diffusers saves a denoiser. Raises InputError where there are none, or a name stands twice."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._entries: dict[str, _Entry] = {}
        for file in _files(self.path):
            for name, entry in _header(file).items():
                if name in self._entries:
                    raise InputError(
                        f"checkpoint {path}: both {self._entries[name].file.name} and {file.name} "
                        f"have {name}: name one of them, {self.path / file.name}"
                    )
                self._entries[name] = entry

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entries[name].shape

    def read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor on the CPU, with the dtype and strides of ``like``."""
        entry = self._entries[name]
        value = _read(entry, math.prod(entry.shape)).view(entry.shape)
        if value.dtype == like.dtype and value.stride() == like.stride():
            return value
        out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        return out.copy_(value)

    def begins_like(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the first elements of a tensor are these, in its dtype."""
        entry = self._entries[name]
        count = min(_SAMPLE // entry.dtype.itemsize, math.prod(entry.shape))
        mine = tensor.detach().flatten()[:count].cpu()
        return torch.equal(_read(entry, count).to(mine.dtype), mine)

    def words(self) -> Iterable[str]:
        """What tells it from others: names, shapes and the first bytes of everything."""
        for name, entry in sorted(self._entries.items()):
            count = min(_SAMPLE // entry.dtype.itemsize, math.prod(entry.shape))
            begin = _read(entry, count).view(torch.uint8).numpy().tobytes()
            yield f"{name} {entry.dtype} {entry.shape} {hashlib.sha1(begin).hexdigest()}"


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        names = json.loads(indices[0].read_text())["weight_map"].values()
        return [path / name for name in sorted(set(names))]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"checkpoint {path}: there is no such file, or no *.safetensors in that folder"
        )
    return files


def _header(file: Path) -> dict[str, _Entry]:
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > _LONGEST:
                raise ValueError("its beginning is no length of a header")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        return {
            name: _Entry(
                file,
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"checkpoint {file} cannot be read as safetensors: {type(e).__name__}: {e}"
        ) from e


def _read(entry: _Entry, count: int) -> torch.Tensor:
    """The first elements of a tensor, flat."""
    out = torch.empty(count * entry.dtype.itemsize, dtype=torch.uint8)
    with entry.file.open("rb", buffering=0) as opened:
        opened.seek(entry.begin)
        view, done = out.numpy().data, 0
        while done < len(view):
            got = opened.readinto(view[done:])
            if not got:
                raise InputError(f"checkpoint {entry.file} ends before its tensors do")
            done += got
    return out.view(entry.dtype)
