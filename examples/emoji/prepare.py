"""Fetch the Noto emoji pictures and pack the chosen ones into one small .npz file.

    python examples/emoji/prepare.py

The pictures are the 64-pixel Google ones of the npm package ``emoji-datasource-google``
(Noto emoji, Apache License 2.0). The package (74 MB) is fetched once and kept in ``out/emoji``.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = "16.0.0"
URL = f"https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-{VERSION}.tgz"

# Groups (the package's "subcategory") that are taken whole.
GROUPS = {
    "face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical",
    "face-sleepy", "face-unwell", "face-hat", "face-glasses", "face-concerned", "face-negative",
    "face-costume", "cat-face", "monkey-face", "heart", "geometric", "hand-fingers-open",
    "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands", "person",
    "person-fantasy", "animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile",
    "animal-marine", "animal-bug", "plant-flower", "plant-other", "food-fruit", "food-vegetable",
    "food-prepared", "food-asian", "food-sweet", "drink", "place-building", "transport-ground",
    "transport-water", "transport-air", "sky & weather", "award-medal", "sport",
}  # fmt: skip

# Single pictures of other groups.
SINGLES = {
    "kiss mark", "hundred points", "collision", "speech balloon", "eyes", "eye", "nose", "ear",
    "mouth", "brain", "tooth", "bone", "flexed biceps", "earth globe europe africa",
    "earth globe americas", "world map", "compass", "snow capped mountain", "volcano", "mount fuji",
    "desert island", "church", "tent", "fountain", "night with stars", "sunrise", "ferris wheel",
    "circus tent", "hourglass", "alarm clock", "stopwatch", "watch", "clock face three oclock",
    "clock face nine oclock", "jack o lantern", "christmas tree", "fireworks", "sparkles",
    "balloon", "party popper", "wrapped present", "direct hit", "kite", "crystal ball", "game die",
    "teddy bear", "video game", "jigsaw puzzle piece", "black spade suit", "black heart suit",
    "black diamond suit", "black club suit", "eyeglasses", "sunglasses", "necktie", "t shirt",
    "jeans", "scarf", "gloves", "socks", "dress", "handbag", "athletic shoe", "high heeled shoe",
    "crown", "top hat", "womans hat", "graduation cap", "lipstick", "ring", "gem stone",
    "chequered flag", "triangular flag on post", "white flag", "rainbow flag", "pirate flag",
}  # fmt: skip

FLAGS = {
    "argentina", "australia", "austria", "bangladesh", "belgium", "brazil", "bulgaria", "canada",
    "chile", "china", "colombia", "cuba", "czechia", "denmark", "estonia", "european union",
    "finland", "france", "germany", "ghana", "greece", "hungary", "iceland", "india", "indonesia",
    "ireland", "israel", "italy", "jamaica", "japan", "kenya", "luxembourg", "mexico", "morocco",
    "netherlands", "nigeria", "norway", "pakistan", "peru", "philippines", "poland", "portugal",
    "romania", "russia", "senegal", "singapore", "south africa", "south korea", "spain", "sweden",
    "switzerland", "thailand", "ukraine", "united kingdom", "united states", "vietnam",
}  # fmt: skip
SINGLES |= {f"{country} flag" for country in FLAGS}

# Names whose Unicode wording says little about the picture.
RENAME = {
    "white smiling face": "smiling face",
    "heavy black heart": "red heart",
    "extraterrestrial alien": "alien",
    "imp": "angry face with horns",
    "pile of poo": "pile of poo with smiling face",
    "japanese ogre": "red ogre",
    "japanese goblin": "red goblin with long nose",
    "slice of pizza": "pizza",
    "house building": "house",
    "basketball and hoop": "basketball",
    "white medium star": "star",
    "front-facing baby chick": "front facing baby chick",
    "face savouring delicious food": "smiling face licking lips",
    "face throwing a kiss": "face blowing a kiss with heart",
    "shocked face with exploding head": "face with exploding head",
    "serious face with symbols covering mouth": "red face with symbols covering mouth",
    "rolling on the floor laughing": "face rolling on the floor laughing",
    "pouting face": "red angry face",
    "grinning face with one large and one small eye": "grinning face with zany eyes",
    "up-pointing red triangle": "red triangle up",
    "down-pointing red triangle": "red triangle down",
    "smiling face with horns": "purple smiling face with horns",
    "angry face with horns": "purple angry face with horns",
    "sign of the horns": "hand with horns",
}
DROP = {
    "medium black circle", "medium white circle", "black medium square", "white medium square",
    "black medium small square", "white medium small square", "black small square",
    "white small square", "small orange diamond", "small blue diamond", "radio button",
    "white square button", "black square button", "love letter", "mending heart",
    "head shaking vertically", "head shaking horizontally", "heart decoration",
}  # fmt: skip
SILENT = {"large", "heavy", "sign", "symbol", "medium", "the"}


def caption_of(name: str) -> str:
    """Lower-case words of a Unicode name, without those that say nothing about the picture."""
    name = name.lower()
    name = RENAME.get(name, name)
    name = RENAME.get(name, name)
    words = re.findall(r"[a-z0-9]+", name.replace("'", ""))
    return " ".join(w for w in words if w not in SILENT)


def fetch(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / URL.rsplit("/", 1)[1]
    if not target.exists():
        print(f"fetching {URL} (74 MB)")
        part = target.with_suffix(".part")
        with urllib.request.urlopen(URL, timeout=300) as answer, part.open("wb") as out:
            while block := answer.read(1 << 20):
                out.write(block)
        part.rename(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("out/emoji"))
    parser.add_argument("--tarball", type=Path, help="the npm package, if it is here already")
    args = parser.parse_args()

    tarball = args.tarball or fetch(args.folder)
    chosen: dict[str, tuple[str, str]] = {}  # file name -> caption, group
    pictures, captions, groups = [], [], []
    with tarfile.open(tarball) as tar:
        # Read once from front to back; pictures that are not wanted are skipped later.
        raw: dict[str, bytes] = {}
        for member in tar:
            if member.name == "package/emoji.json" or member.name.startswith(
                "package/img/google/64/"
            ):
                stream = tar.extractfile(member)
                assert stream is not None
                raw[member.name.rsplit("/", 1)[1]] = stream.read()
    entries = json.loads(raw["emoji.json"])
    seen: set[str] = set()
    for entry in sorted(entries, key=lambda e: e["sort_order"]):
        if not entry["has_img_google"] or entry["name"].lower() in DROP:
            continue
        caption, group = caption_of(entry["name"]), entry["subcategory"]
        if group not in GROUPS and caption not in SINGLES:
            continue
        if not caption or caption in seen or len(caption.split()) > 14:
            continue
        seen.add(caption)
        chosen[entry["image"]] = (caption, group)

    for file, (caption, group) in chosen.items():
        picture = Image.open(io.BytesIO(raw[file])).convert("RGBA")
        assert picture.size == (64, 64), (file, picture.size)
        white = Image.new("RGBA", picture.size, "white")
        pictures.append(np.asarray(Image.alpha_composite(white, picture).convert("RGB")))
        captions.append(caption)
        groups.append(group)

    words = Counter(word for caption in captions for word in caption.split())
    args.folder.mkdir(parents=True, exist_ok=True)
    out = args.folder / "emoji.npz"
    np.savez_compressed(
        out,
        pictures=np.stack(pictures),
        captions=np.array(captions),
        groups=np.array(groups),
        source=np.array(URL),
    )
    print(
        f"{out}: {len(captions)} pictures, {len(words)} words, {out.stat().st_size / 2**20:.2f} MiB"
    )
    if missing := SINGLES - set(captions):
        print("not found:", ", ".join(sorted(missing)))


if __name__ == "__main__":
    main()
