"""What compressing what crosses costs, with what quality="balanced" picks for two devices.

    python benchmarks/fidelity/compression.py                   # both yardsticks, 4 pictures each
    python benchmarks/fidelity/compression.py --models unet --samplers euler --pictures 16

Every row is one batch of pictures beside those of the plain pipeline from the same noise: the mean
PSNR. Beside the settings there is, of two runs, what lies behind them: codes of the values
themselves, or of their change since the last ones, in place of what a straight line through the
last two leaves; and exact steps whose bundles are compressed, too.

Writes fidelity_compression.json. Rows that it has already are kept: a run can be continued.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from asyncdiff.runtime.exchange.compression import reference
from asyncdiff.runtime.exchange.compression.sent import Sent
from asyncdiff.tools.fidelity import fidelity
from fidelity.chosen import Chosen
from fidelity.rows import SAMPLERS, Run, run_of
from fidelity.subjects import MODELS, Subject, Yardstick, subject

OUT = results_file.ROOT / "benchmarks" / "results" / "fidelity_compression.json"
GUIDANCES = (1.0, 2.0, 5.0)
#: The runs of which also what lies behind the settings is measured: sampler and guidance.
BEHIND = {("euler", 2.0), ("flow", 2.0)}


@dataclass(frozen=True)
class Way:
    """A row. ``compress``: the setting; ``expected``: in place of what a reader expects of a value,
    by the last two; ``exact``: whether exact steps are compressed, too."""

    name: str
    compress: str | None
    expected: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    exact: bool = False

    def applied(self) -> AbstractContextManager[Any]:
        """The engine computes so inside the ``with``, on the CPU."""
        if self.expected is not None:
            return patch.object(reference, "_expected", self.expected)
        return patch.object(Sent, "add", _all_but_the_first) if self.exact else nullcontext()


def _nothing(last: torch.Tensor, older: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(last, dtype=torch.float32)


def _the_last(last: torch.Tensor, older: torch.Tensor) -> torch.Tensor:
    return last.float()


_add = Sent.add


def _all_but_the_first(sent: Sent, tick: Any) -> None:
    """As if no step but a generation's first one were exact."""
    known = any(sent._routes.values())
    _add(sent, type(tick)(tick.index, tick.exact and not known, tick.serves, tick.actions))


SETTINGS = (Way("as it is", None), Way("fp8", "fp8"), Way("int8", "int8"))
OTHERS = (
    *(Way(f"{kind}, of the value", kind, _nothing) for kind in ("fp8", "int8")),
    *(Way(f"{kind}, of the change", kind, _the_last) for kind in ("fp8", "int8")),
    *(Way(f"{kind}, exact steps too", kind, exact=True) for kind in ("fp8", "int8")),
)


def run_rows(model: Subject, run: Run, pictures: int, rows: list[Any], save: Callable) -> None:
    """All rows of one run; ``save`` is called after each."""
    ways = (*SETTINGS, *(OTHERS if (run.sampler, run.guidance) in BEHIND else ()))
    here = {r["way"] for r in rows if r["model"] == model.name and run_of(r) == run}
    if here >= {way.name for way in ways}:
        return
    pipe = model.load("cpu", run.sampler)
    texts = model.prompts(pictures)

    def call() -> dict[str, Any]:
        noise = [torch.Generator("cpu").manual_seed(i) for i in range(len(texts))]
        return {"prompt": texts, "guidance_scale": run.guidance, "generator": noise}

    with torch.no_grad():
        out = pipe(**call(), num_inference_steps=run.steps, output_type="pt")
    plain = out.images.float()
    for way in ways:
        if way.name in here:
            continue
        method = Chosen("balanced", 2, "cpu", run.guidance > 1, way.compress)
        begun = time.perf_counter()
        with way.applied():
            images = method.run(pipe, call(), run.steps)
        row = {
            "model": model.name,
            **run._asdict(),
            "way": way.name,
            "psnr_db": fidelity(images, plain, texts, {}).psnr_db,
            "seconds_here": time.perf_counter() - begun,
        }
        rows.append(row)
        save()
        print(f"{model.name}, {run}, {way.name}: {row['psnr_db']:.2f} dB", flush=True)


def _place(row: dict[str, Any]) -> tuple[int, int, float, int]:
    """By model, sampler, guidance and way."""
    names = [way.name for way in (*SETTINGS, *OTHERS)]
    model, sampler = MODELS.index(row["model"]), list(SAMPLERS).index(row["sampler"])
    return model, sampler, row["guidance"], names.index(row["way"])


def runs(model: Subject, samplers: list[str] | None) -> Iterator[Run]:
    """The runs of a model."""
    for sampler, steps in model.steps.items():
        if samplers is None or sampler in samplers:
            yield from (Run(sampler, steps, guidance) for guidance in GUIDANCES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["unet", "transformer"])
    parser.add_argument("--samplers", nargs="+", help="ddim, dpm, euler or flow; default: all")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    settings = {"pictures": args.pictures, "devices": 2, "quality": "balanced"}
    rows: list[dict[str, Any]] = []
    if args.out.exists():
        old = json.loads(args.out.read_text())["figures"]
        if old["settings"] == settings:
            rows = old["rows"]

    def save() -> None:
        rows.sort(key=_place)
        results_file.write(args.out, {"settings": settings, "rows": rows})

    for name in args.models:
        asked = argparse.Namespace(model=name, pipeline=None, weights=None)
        model = subject(asked)
        assert isinstance(model, Yardstick)  # whose pictures have variety
        for run in runs(model, args.samplers):
            run_rows(model, run, args.pictures, rows, save)
    save()
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
