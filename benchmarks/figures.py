"""Draw the README's figure and picture.

python benchmarks/figures.py            # docs/images/speed_and_quality.png, plain_and_parallel.png
python benchmarks/figures.py --check    # exit code 1 if the figure is not of the committed results
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "fidelity.json"
IMAGES = ROOT / "docs" / "images"
FIGURE = IMAGES / "speed_and_quality.png"
PICTURE = IMAGES / "plain_and_parallel.png"

#: Curves: label, colour, marker, and which rows of the results they join.
CURVES: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        "as published: 2, 3, 4 GPUs",
        "C3",
        "o",
        tuple(f"asyncdiff N={n} S=1 w=1" for n in (2, 3, 4)),
    ),
    (
        "waves: 2, 3, 4 GPUs",
        "C0",
        "s",
        tuple(f"wavefront N={n} S=1 w=1" for n in (2, 3, 4)),
    ),
    (
        "waves, last step exact: 2, 3, 4 GPUs",
        "C2",
        "^",
        tuple(f"wavefront N={n} S=1 w=1 tail=1" for n in (2, 3, 4)),
    ),
    (
        "waves, last four steps exact: 2, 3, 4 GPUs",
        "C4",
        "D",
        tuple(f"wavefront N={n} S=1 w=1 tail=4" for n in (2, 3, 4)),
    ),
    (
        "one GPU, fewer steps: 40, 33, 25, 17",
        "0.4",
        "x",
        tuple(f"fewer steps, {n}" for n in (40, 33, 25, 17)),
    ),
    (
        "DistriFusion (our emulation): 2, 4 GPUs",
        "C1",
        "v",
        tuple(f"DistriFusion, {n} patches, 1 synchronous" for n in (2, 4)),
    ),
)


def curves() -> list[list[tuple[float, float]]]:
    """Speed-up and PSNR in dB of each curve's points: DDIM in 50 steps."""
    rows = json.loads(RESULTS.read_text())["figures"]["rows"]
    found = {r["method"]: (r["speedup"], r["psnr_db"]) for r in rows if r["sampler"] == "ddim"}
    return [[found[method] for method in methods] for *_, methods in CURVES]


def digest() -> str:
    """What the figure is made of: its points and how they are drawn."""
    return hashlib.sha256(repr((CURVES, curves())).encode()).hexdigest()[:16]


def speed_and_quality(path: Path) -> None:
    """Speed-up against PSNR, from the results of the fidelity benchmark."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for (label, color, marker, _), points in zip(CURVES, curves(), strict=True):
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
    axes.set(
        xlabel="times one GPU's speed, counted in multiply-accumulates of the slowest GPU",
        ylabel="likeness to the plain picture, PSNR in dB",
        xlim=(1, 4.2),
        ylim=(25, 75),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=110, metadata={"Description": digest()})


def plain_and_parallel(path: Path) -> None:
    """The shipped model on one device and on two, from the same noise, on the CPU."""
    import torch
    from PIL import Image

    import asyncdiff
    from asyncdiff import demo
    from asyncdiff.cli.commands.demo import PICTURES
    from asyncdiff.cli.subject import chosen
    from asyncdiff.tools import compare

    prompts = chosen(list(demo.known_prompts()), PICTURES)
    pipe = demo.load()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> list[Any]:
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        return list(pipe(prompts, num_inference_steps=50, generator=generators).images)

    rows, notes = {"one device": draw()}, {}
    options: dict[str, dict[str, Any]] = {
        "two, waves,\nlast step exact": {"schedule": "wavefront", "exact_tail": 1},
        "two, as\npublished": {},
    }
    for name, settings in options.items():
        handle = asyncdiff.parallelize(pipe, ["cpu"] * 2, components=2, warmup=1, **settings)
        rows[name] = draw()
        handle.restore()
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
