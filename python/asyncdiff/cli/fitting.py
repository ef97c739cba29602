"""What of a model fits on which cards: ``asyncdiff plan --memory``."""

from __future__ import annotations

from typing import Any

import typer

from ..errors import InputError
from . import console
from .options import Cards, Setting, read_sizes
from .subject import Model


def what_fits(
    subject: Model,
    setting: Setting,
    known: Cards,
    cards: str | None,
    height: int | None,
    width: int | None,
) -> dict[str, Any]:
    """As plain data. Raises typer.BadParameter and InputError for what cannot be looked at."""
    subject.check()
    if subject.load:
        raise typer.BadParameter("--memory loads no weights: leave --load out")
    sizes = None if cards is None else read_sizes("--cards", cards)
    subject.announce()
    import torch

    from ..graph.capture import capture
    from ..graph.example_inputs import example_inputs
    from ..graph.signature import parse
    from ..integrations.diffusers.denoisers import find_denoisers
    from ..partition.memory import of_module, read_size
    from ..partition.speeds import check_entries
    from ..schedule.plan import Exchange, ring
    from ..tools.fitting import fitting, usable

    every = _here() if sizes is None else [read_size(size) for size in sizes]
    arguments = known.arguments()
    if "memory" in arguments:
        raise typer.BadParameter("--memory looks at whole cards: say their sizes by --cards")
    speeds = arguments.get("speeds")
    check_entries("speeds", speeds, len(every))
    dtype = subject.dtype or "bfloat16"
    pipe = _parts(subject, getattr(torch, dtype))
    denoisers = find_denoisers(pipe)
    module = next(iter(denoisers.values()))
    scale = getattr(pipe, "vae_scale_factor", 8)
    call = parse(module, (), example_inputs(module, height=height, width=width, scale=scale))
    console.remark("exporting the denoiser, without weights")
    captured = capture(module, call)
    count = len(every)
    edges = [Exchange(i, j) for i in range(count) for j in range(i + 1, count)]
    slots = ring(edges, count, setting.schedule, delay=setting.delay)
    others = {
        name: of_module(part)
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module) and name not in denoisers
    }
    ways = fitting(captured, others, every, slots, speeds, len(denoisers))
    return {
        "model": subject.name,
        "denoiser": " and ".join(type(d).__name__ for d in denoisers.values()),
        "dtype": dtype,
        "denoiser_bytes": sum(map(of_module, denoisers.values())),
        "inputs": {x.name: list(x.shape) for x in captured.signature.inputs},
        "cards": [{"bytes": card, "usable_bytes": usable(card)} for card in every],
        "others": others,
        "ways": [way.to_dict() for way in ways],
    }


def _here() -> list[int]:
    """The memory of the GPUs that are here. Raises InputError where there is none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise InputError("there is no GPU here: say which cards are meant, --cards 24GB,12GB")
    return [int(torch.cuda.get_device_properties(i).total_memory) for i in range(count)]


def _parts(subject: Model, dtype: Any) -> Any:
    if subject.model is not None:
        from .published import parts_of

        return parts_of(subject.model, dtype)
    return subject.pipeline("cpu").to(dtype)
