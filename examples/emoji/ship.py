"""Copy a trained model into the package and draw the sheet of the documentation.

    python examples/emoji/ship.py out/emoji/run --all out/emoji/all.png
    python examples/emoji/ship.py out/emoji/run --sheet docs/images/emoji_sheet.png

``not_known.txt`` beside this file holds the captions, one a line, that are no good prompts: drawn
badly (look at what --all draws), or with words that mislead, such as "black heart suit" for a red
picture. Every other caption becomes a known prompt.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from train import sheet  # also puts this checkout on the path

from asyncdiff.demo import model as demo_model

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "python/asyncdiff/demo"
LICENCE = "The pictures are Noto Emoji's, Copyright Google, under the Apache License 2.0."
UNSEEN = [
    "purple house", "pink circle", "red flag", "red car", "heart face", "sunglasses face",
    "smiling face with hat", "blue star", "green tiger", "tiger with crown",
]  # fmt: skip
"""Words that it knows in combinations that it was never shown."""
NOT_KNOWN = Path(__file__).with_name("not_known.txt")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder that train.py wrote")
    parser.add_argument("--all", type=Path, help="draw every caption to this picture (slow)")
    parser.add_argument("--sheet", type=Path, help="draw every 17th caption, then UNSEEN")
    args = parser.parse_args()

    config = json.loads((args.run / "config.json").read_text())
    bad = (
        {line for line in NOT_KNOWN.read_text().splitlines() if line}
        if NOT_KNOWN.exists()
        else set()
    )
    if strange := bad - set(config["captions"]):
        raise SystemExit(f"not captions of this model: {', '.join(sorted(strange))}")
    config["known_prompts"] = [c for c in config["captions"] if c not in bad]
    training = json.loads((args.run / "training.json").read_text())
    config["licence"] = LICENCE
    config["training"] = {key: value for key, value in training.items() if key != "log"}
    (DEMO / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    shutil.copyfile(args.run / "model.safetensors", DEMO / "model.safetensors")

    torch.set_grad_enabled(False)
    pipe = demo_model.load()
    pipe.set_progress_bar_config(disable=True)
    captions = demo_model.captions()
    if args.sheet:
        sheet(pipe, captions[8::17][:50] + UNSEEN, args.sheet, steps=50)
    if args.all:
        sheet(pipe, captions, args.all, steps=25)


if __name__ == "__main__":
    main()
