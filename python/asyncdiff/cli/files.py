"""What a command writes, checked before it works."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from ..errors import InputError

#: Formats of pictures, by what a file's name ends with.
PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
#: So many bytes have to be free: more than what is written needs.
_ROOM = 4 << 20
#: The EXIF tag ImageDescription.
_DESCRIPTION = 0x010E


def check_picture(path: Path, kinds: Sequence[str] = tuple(PICTURES)) -> None:
    """Raise typer.BadParameter where ``path`` names no kind of picture, or cannot be written."""
    if path.suffix.lower() not in kinds:
        *most, last = kinds
        names = f"{', '.join(most)} or {last}" if most else last
        raise typer.BadParameter(f"{path}: name a picture that ends in {names}")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Make the folder that ``path`` goes to, and try to write there. Raises typer.BadParameter."""
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder: name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(0, "it is there and read-only")
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(bytes(_ROOM))
    except OSError as error:
        raise typer.BadParameter(f"cannot write {path}: {error.strerror}") from error


def save_picture(picture: Any, path: Path, told: Mapping[str, Any]) -> None:
    """A PIL image, as its file's name says, with ``told`` as JSON in its metadata: of a PNG as the
    text ``asyncdiff``, else as EXIF's description. Raises InputError where it cannot be written."""
    from PIL import Image, PngImagePlugin

    text = json.dumps(told, default=str)
    kind = PICTURES[path.suffix.lower()]
    options: dict[str, Any] = {}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("asyncdiff", text)
    else:
        options["exif"] = Image.Exif()
        options["exif"][_DESCRIPTION] = text
        options["quality"] = 95
    try:
        picture.save(path, format=kind, **options)
    except OSError as error:  # a disk that has become full meanwhile
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
