"""How alike two pictures are (PSNR, SSIM), and sheets that show them beside each other.

Pictures are PIL images, or arrays of shape (height, width[, channels]): unsigned bytes, or floats
between 0 and 1.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from ..errors import AsyncDiffError, InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Picture = Any  # PIL image or array; the libraries are optional


def _pillow() -> Any:
    try:
        import PIL.ImageDraw
        import PIL.ImageFont
        import PIL.ImageOps
    except ImportError as error:
        raise AsyncDiffError("pictures need pillow: pip install 'asyncdiff[demo]'") from error
    return PIL


def pixels(picture: Picture) -> np.ndarray:
    """The picture as float64 (height, width, channels) between 0 and 1; alpha is dropped.

    Raises InputError for what is no picture.
    """
    import numpy as np

    array = np.asarray(picture)
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.dtype.kind not in "uf" or 0 in array.shape:
        raise InputError(f"no picture: an array of shape {array.shape} and type {array.dtype}")
    return array[..., :3].astype(np.float64) / scale


def _pair(a: Picture, b: Picture) -> tuple[np.ndarray, np.ndarray]:
    first, second = pixels(a), pixels(b)
    if first.shape != second.shape:
        raise InputError(f"pictures of different shapes: {first.shape} and {second.shape}")
    return first, second


def psnr(a: Picture, b: Picture) -> float:
    """Peak signal-to-noise ratio in dB over a range of 1; infinite for equal pictures.

    Raises InputError for pictures of different sizes.
    """
    first, second = _pair(a, b)
    error = float(((first - second) ** 2).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Picture, b: Picture) -> float:
    """Structural similarity, 1 for equal pictures: windows of 7 pixels, mean over channels.

    Raises InputError for different sizes or pictures below 7 pixels, AsyncDiffError where
    scikit-image is missing.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise AsyncDiffError("SSIM needs scikit-image: pip install 'asyncdiff[demo]'") from error
    first, second = _pair(a, b)
    if min(first.shape[:2]) < 7:
        raise InputError(f"SSIM needs 7 pixels a side, not {first.shape[1]} x {first.shape[0]}")
    return float(structural_similarity(first, second, channel_axis=-1, data_range=1.0))


def image(picture: Picture) -> Image:
    """The picture as an RGB PIL image."""
    pillow = _pillow()
    if isinstance(picture, pillow.Image.Image):
        return picture.convert("RGB")
    import numpy as np

    array = (pixels(picture).clip(0, 1) * 255).round().astype(np.uint8)
    return pillow.Image.fromarray(array.repeat(3, axis=-1) if array.shape[-1] == 1 else array)


def sheet(
    rows: Mapping[str, Sequence[Picture]],
    columns: Sequence[str],
    path: str | PathLike[str] | None = None,
    cell: int | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> Image:
    """A labelled table of pictures: ``rows`` by heading, one picture for each of ``columns``.

    ``notes``: by heading, a line under each picture of that row.

    ``cell`` is the side of a cell in pixels (default: the largest picture, at least 128; smaller
    ones are enlarged by whole factors, so that no pixel is invented). Saved to ``path`` if given,
    in the format that its name says. Raises InputError where rows and columns do not fit together.
    """
    pillow = _pillow()
    table = {name: [image(p) for p in row] for name, row in rows.items()}
    if not table or not columns or any(len(row) != len(columns) for row in table.values()):
        raise InputError("a sheet needs as many pictures in every row as it has columns")
    notes = notes or {}
    side = cell or max(128, *(max(p.size) for row in table.values() for p in row))
    gap = max(4, side // 24)
    font, small = (pillow.ImageFont.load_default(size=max(11, side // n)) for n in (10, 11))
    letters = max(1, int(side / font.getlength("0")))  # that go into a line, about
    heads = [textwrap.wrap(c, letters, max_lines=3, placeholder="…") for c in columns]
    top = int(1.6 * font.size) * max(1, *map(len, heads))
    left = 8 + max(int(font.getlength(line)) for name in table for line in name.split("\n"))
    under = {name: int(1.5 * small.size) if name in notes else 0 for name in table}
    height = top + gap + sum(side + gap + extra for extra in under.values())
    out = pillow.Image.new("RGB", (left + len(columns) * (side + gap) + gap, height), "white")
    pen = pillow.ImageDraw.Draw(out)
    at = [left + gap + c * (side + gap) for c in range(len(columns))]
    for x, head in zip(at, heads, strict=True):
        pen.multiline_text((x, gap), "\n".join(head), fill="black", font=font)
    y = top + gap
    for name, row in table.items():
        pen.multiline_text((4, y + side // 2), name, fill="black", font=font, anchor="lm")
        for c, (x, picture) in enumerate(zip(at, row, strict=True)):
            if max(picture.size) > side:
                shown = pillow.ImageOps.contain(
                    picture, (side, side), pillow.Image.Resampling.LANCZOS
                )
            else:
                shown = pillow.ImageOps.scale(
                    picture, side // max(picture.size), pillow.Image.Resampling.NEAREST
                )
            out.paste(shown, (x + (side - shown.width) // 2, y + (side - shown.height) // 2))
            if name in notes:
                below = (x + side // 2, y + side)
                pen.text(below, notes[name][c], fill="black", font=small, anchor="ma")
        y += side + gap + under[name]
    if path is not None:
        out.save(path)
    return out


def difference(a: Picture, b: Picture, factor: float = 1.0) -> Image:
    """How far two pictures lie apart, ``factor`` times: black where they are equal. Raises
    InputError for pictures of different sizes."""
    first, second = _pair(a, b)
    return image((abs(first - second) * factor).clip(0, 1))


def side_by_side(
    images: Sequence[Picture], labels: Sequence[str], path: str | PathLike[str] | None = None
) -> Image:
    """Pictures in one row under their labels. Saved to ``path`` if given."""
    return sheet({"": images}, labels, path)
