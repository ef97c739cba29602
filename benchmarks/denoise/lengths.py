"""Measure what another length of the prompt costs: exported, and by numbers put into an export with
symbols (:mod:`asyncdiff.graph.tracing.resizing`).

    python benchmarks/denoise/lengths.py                   # Qwen-Image and Z-Image, on the CPU

Denoisers have as many layers as the published ones, "wide" also their sizes (on the meta device:
nothing is computed), "narrow" some hundredths of their widths. Printed, and written to ``--out``:
seconds of an export (the median of the lengths), of the one with symbols, of putting numbers into
it (the median), whether the graphs are equal; of the narrow Qwen-Image also the seconds of
``AsyncDenoiser.prepare`` for one more length, on two ranks, without compiling, either way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from asyncdiff import AsyncDenoiser
from asyncdiff.graph.capture import capture
from asyncdiff.graph.signature import parse
from asyncdiff.graph.state.structure import Structure
from asyncdiff.graph.tracing.resizing import Resizable, Twin, equal
from asyncdiff.graph.tracing.symbols import open_sizes
from asyncdiff.preparation.sizes import Sizes

_LENGTHS = (40, 57, 101)
#: A denoiser, and its call for a length.
Made = tuple[Any, Callable[[int], dict[str, Any]]]


def qwen(wide: bool) -> Made:
    """Qwen-Image: 60 layers; a picture of 1024² or 128²."""
    import diffusers

    device, text, side = ("meta", 3584, 64) if wide else ("cpu", 32, 8)
    sizes = {
        "in_channels": 16,
        "out_channels": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": text,
        "axes_dims_rope": (8, 12, 12),
    }
    with torch.device(device):
        made: Any = diffusers.QwenImageTransformer2DModel(**({} if wide else sizes))

    def call(length: int) -> dict[str, Any]:
        channels = made.config.in_channels
        return {
            "hidden_states": torch.zeros(1, side * side, channels, device=device),
            "encoder_hidden_states": torch.zeros(1, length, text, device=device),
            "timestep": torch.ones(1, device=device),
            "img_shapes": [[(1, side, side)]],
            "return_dict": False,
        }

    return made.eval(), call


def z_image(wide: bool) -> Made:
    """Z-Image: 30 layers, and two before them for the picture and the text each; narrow only: it
    keeps tables, which have values."""
    import diffusers

    assert not wide
    made: Any = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 12, 12],
    )

    def call(length: int) -> dict[str, Any]:
        x, text = torch.zeros(4, 1, 16, 16), torch.zeros(length, 32)
        return {"x": [x], "t": torch.ones(1), "cap_feats": [text], "return_dict": False}

    with torch.no_grad():
        made(**call(40))
    return made.eval(), call


MODELS: dict[str, Callable[[], Made]] = {
    "qwen": lambda: qwen(True),
    "qwen-narrow": lambda: qwen(False),
    "z-image-narrow": lambda: z_image(False),
}


def measure(key: str) -> dict[str, Any]:
    """The figures of one denoiser."""
    module, arguments = MODELS[key]()
    calls = [parse(module, (), arguments(length)) for length in _LENGTHS]
    exported = [timed(lambda call=call: capture(module, call)) for call in calls]
    twins = [Twin.of(captured) for _, captured in exported]
    sizes = open_sizes(calls[0].signature, calls[1].signature)
    symbols_s, symbolic = timed(lambda: Resizable(capture(module, calls[1], sizes)))
    structure = Structure(module)
    put = [timed(lambda c=c: symbolic.at(c.signature, structure, twins[0])) for c in calls]
    figures = {
        "nodes": len(exported[0][1].nodes),
        "export_s": round(statistics.median(s for s, _ in exported), 2),
        "symbols_s": round(symbols_s, 2),
        "numbers_s": round(statistics.median(s for s, _ in put), 2),
        "equal": all(equal(made, twin) for (_, made), twin in zip(put, twins, strict=True)),
    }
    if key == "qwen-narrow":
        figures["prepare_exporting_s"] = prepared(module, arguments, symbols=False)
        figures["prepare_s"] = prepared(module, arguments, symbols=True)
    return figures


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the work returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def prepared(module: Any, arguments: Callable[[int], dict[str, Any]], *, symbols: bool) -> float:
    """Seconds of preparing for one more length."""
    tried = Sizes._with_symbols
    if not symbols:
        Sizes._with_symbols = lambda self, _, key, *__: self._found.setdefault(key)  # type: ignore
    denoiser = AsyncDenoiser(module, devices=["cpu"] * 2, split="estimate", warmup=1)
    try:
        with torch.no_grad():
            every = [
                timed(lambda n=n: denoiser.prepare(steps=2, **arguments(n)))[0] for n in _LENGTHS
            ]
    finally:
        denoiser.close()
        Sizes._with_symbols = tried  # type: ignore[method-assign]
    return round(every[-1], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, default=results_file.ROOT / "out" / "lengths.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = results_file.continued(args.out)  # those of other models stay
    for key in args.models:
        figures[key] = measure(key)
        print(f"{key}: {json.dumps(figures[key])}", flush=True)
        results_file.write(args.out, figures)


if __name__ == "__main__":
    main()
