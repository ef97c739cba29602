"""Draw the README's figure and picture.

python benchmarks/figures.py            # docs/images/speed_and_quality.png, plain_and_parallel.png
python benchmarks/figures.py --check    # exit code 1 if the figure is not of the committed results
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import results_file
from fidelity.rows import TITLES, Run, by_run, documents

RESULTS = results_file.ROOT / "benchmarks" / "results"
IMAGES = results_file.ROOT / "docs" / "images"
FIGURE = IMAGES / "speed_and_quality.png"
PICTURE = IMAGES / "plain_and_parallel.png"

#: What of each model is drawn: sampler and steps, with guidance.
RUNS = {"unet": ("ddim", 50), "transformer": ("flow", 28), "emoji": ("ddim", 50)}
#: Pictures that are closer than this, in dB, are drawn here: they look equal.
TOP = 75.0
#: Curves: label, colour, marker, and which rows of the results they join.
CURVES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    *(
        (
            f'quality="{quality}": 2, 3, 4 GPUs',
            color,
            "s",
            tuple(f"quality {quality}, {n} devices" for n in (2, 3, 4)),
        )
        for quality, color in (("high", "C2"), ("balanced", "C0"), ("fast", "C4"))
    ),
    (
        "as published: 2, 3, 4 GPUs",
        "C3",
        "o",
        tuple(f"asyncdiff N={n} S=1 w=1" for n in (2, 3, 4)),
    ),
    (
        "waves, one exact step: 2, 3, 4 GPUs",
        "C5",
        "^",
        tuple(f"wavefront N={n} S=1 w=1" for n in (2, 3, 4)),
    ),
    ("one GPU, fewer steps", "0.4", "x", ("fewer steps",)),
    (
        "DistriFusion (our emulation): 2, 4 GPUs",
        "C1",
        "v",
        tuple(f"DistriFusion, {n} patches, 1 synchronous" for n in (2, 4)),
    ),
)


def curves() -> dict[str, tuple[Run, list[list[tuple[float, float]]]]]:
    """Speed-up and PSNR in dB of each curve's points, by model, of those that there are."""
    found = {}
    for model, _, document in documents(RESULTS):
        for run, rows in by_run(document["figures"]["rows"]).items():
            if (run.sampler, run.steps) == RUNS[model] and run.guidance > 1:
                points = [
                    sorted(
                        (r["speedup"], min(r["psnr_db"], TOP))
                        for r in rows
                        if _kind(r["method"]) in methods
                    )
                    for *_, methods in CURVES
                ]
                found.setdefault(model, (run, points))
    return found


def _kind(method: str) -> str:
    return "fewer steps" if method.startswith("fewer steps,") else method


def digest() -> str:
    """What the figure is made of: its points and how they are drawn."""
    return hashlib.sha256(repr((CURVES, curves())).encode()).hexdigest()[:16]


def speed_and_quality(path: Path) -> None:
    """Speed-up against PSNR, from the results of the fidelity benchmark: a panel for each model."""
    from matplotlib.figure import Figure

    models = curves()
    figure = Figure(figsize=(1.6 + 5.6 * len(models), 4.9), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    for axes, (model, (run, lines)) in zip(panels, models.items(), strict=True):
        for (label, color, marker, _), points in zip(CURVES, lines, strict=True):
            if points:
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
        axes.set_title(f"{TITLES[model]}: {run}", fontsize=9)
        axes.set(xlim=(1, 4.2), ylim=(15, TOP + 2))
        axes.grid(alpha=0.3)
    named = {line.get_label(): line for axes in panels for line in axes.lines}
    figure.legend(named.values(), named, fontsize=8, ncols=4, loc="outside upper center")
    figure.supxlabel("times one GPU's speed, counted in multiply-accumulates", fontsize=10)
    figure.supylabel("likeness to the plain picture, PSNR in dB", fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Description": digest()})


def plain_and_parallel(path: Path) -> None:
    """The shipped model on one device and on two, from the same noise, on the CPU."""
    from PIL import Image

    import asyncdiff
    from asyncdiff import demo
    from asyncdiff.cli.commands.demo import PICTURES
    from asyncdiff.cli.running import noise
    from asyncdiff.cli.subject import chosen
    from asyncdiff.tools import compare

    prompts = chosen(list(demo.known_prompts()), PICTURES)
    pipe = demo.load()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> list[Any]:
        # One by one: several at once would be drawn exactly.
        drawn = (pipe(text, generator=noise(i)).images for i, text in enumerate(prompts))
        return [images[0] for images in drawn]

    rows, notes = {"one device": draw()}, {}
    options: dict[str, dict[str, Any]] = {
        "two": {},
        "two, as\npublished": {"quality": None},
    }
    for name, settings in options.items():
        with asyncdiff.parallelize(pipe, ["cpu"] * 2, **settings):
            rows[name] = draw()
        pairs = zip(rows["one device"], rows[name], strict=True)
        notes[name] = [f"{compare.psnr(a, b):.1f} dB" for a, b in pairs]
    # 256 colours, none of them mixed from dots, which would look like grain of the model.
    sheet = compare.sheet(rows, prompts, notes=notes).quantize(256, dither=Image.Dither.NONE)
    sheet.save(path, optimize=True)


def main() -> None:
    if "--check" in sys.argv[1:]:
        from PIL import Image

        drawn = Image.open(FIGURE).info.get("Description")
        stale = drawn != digest()
        raise SystemExit("docs/images: python benchmarks/figures.py draws it anew" if stale else 0)
    IMAGES.mkdir(exist_ok=True)
    speed_and_quality(FIGURE)
    plain_and_parallel(PICTURE)


if __name__ == "__main__":
    main()
