"""A sheet of samples: a row for each class, a column for each seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from yardsticks.pictures import CLASSES


def draw(pipe: Any, path: Path, each: int = 10, scale: int = 2, **call: Any) -> None:
    """Draw ``each`` pictures of every class, enlarged ``scale`` times, and write them to ``path``.
    ``call``: further arguments of the pipeline."""
    names = [name for name in CLASSES for _ in range(each)]
    generators = [torch.Generator().manual_seed(i) for i in range(len(names))]
    pictures = pipe(names, generator=generators, **call).images
    side, margin = pictures[0].width * scale, 70
    page = Image.new("RGB", (margin + each * side, len(CLASSES) * side), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for i, picture in enumerate(pictures):
        x, y = margin + i % each * side, i // each * side
        page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y))
        if i % each == 0:
            pen.text((4, y + side / 2), names[i], fill="black", font=font, anchor="lm")
    page.save(path)
