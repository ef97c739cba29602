"""What of a model fits on which cards: ``asyncdiff plan --memory``."""

from __future__ import annotations

from typing import Any

import typer

from ..errors import InputError
from . import console
from .option_groups import Given
from .option_values import read_sizes
from .options import Cards, Links, Setting
from .subject import Model


def what_fits(
    subject: Model,
    setting: Setting,
    given: Given,
    known: Cards,
    links: Links,
    split: bool,
    cards: str | None,
    height: int | None,
    width: int | None,
) -> dict[str, Any]:
    """As plain data; ``split``: guidance is. Raises typer.BadParameter, InputError and PlanError
    for what cannot be looked at, and as :func:`asyncdiff.tools.fitting.fitting` does."""
    subject.check()
    if subject.load:
        raise typer.BadParameter("--memory loads no weights: leave --load out")
    sizes = None if cards is None else read_sizes("--cards", cards)
    compress = "compress" in links.arguments()
    components = setting.components if "components" in given.names else None
    _check(setting, components)
    subject.announce()
    import torch

    from ..graph.capture import capture
    from ..graph.example_inputs import example_inputs
    from ..graph.signature import parse
    from ..integrations.diffusers.denoisers import find_denoisers
    from ..partition.memory import of_module, read_size
    from ..partition.speeds import check_entries
    from ..tools.fitting import Settings, fitting, usable

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
    # One condition, where each half of the ranks has its own.
    batch = 1 if split else 2
    inputs = example_inputs(module, height=height, width=width, scale=scale, batch=batch)
    call = parse(module, (), inputs)
    console.remark("exporting the denoiser, without weights")
    captured = capture(module, call)
    settings = Settings(
        components, setting.stride, setting.schedule, setting.delay, split, compress
    )
    others = {
        name: of_module(part)
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module) and name not in denoisers
    }
    ways = fitting(captured, others, every, settings, speeds, len(denoisers))
    return {
        "model": subject.name,
        "denoiser": " and ".join(type(d).__name__ for d in denoisers.values()),
        "dtype": dtype,
        **vars(settings),
        "denoiser_bytes": sum(map(of_module, denoisers.values())),
        "inputs": {x.name: list(x.shape) for x in captured.signature.inputs},
        "cards": [{"bytes": card, "usable_bytes": usable(card)} for card in every],
        "others": others,
        "ways": [way.to_dict() for way in ways],
    }


def _check(setting: Setting, components: int | None) -> None:
    """Raise PlanError for numbers that no plan has; ``components``: None where that is open."""
    from ..schedule.plan import check_delay, check_numbers, check_schedule

    check_schedule(setting.schedule, stride=setting.stride)
    check_numbers(1 if components is None else components, setting.stride, 1)
    if components is not None or setting.schedule != "wavefront":
        check_delay(setting.delay, setting.schedule, components or 1)
    elif setting.delay is not None:
        check_delay(setting.delay, setting.schedule, max(setting.delay, 1) + 1)


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
