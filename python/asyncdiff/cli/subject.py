"""What ``tune`` and ``calibrate`` work on: a pipeline and prompts of the user's, or the demo's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str | None, typer.Argument(help="A diffusers folder, or an id of the hub.")]
Demo = Annotated[bool, typer.Option("--demo", help="Take the shipped model.")]
Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="What to draw; may be given several times."),
]
PromptsFile = Annotated[
    Path | None, typer.Option(help="Prompts, one a line.", exists=True, dir_okay=False)
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16 (default: float16 on GPUs).")
]


def check(model: str | None, demo: bool, dtype: str | None) -> None:
    """Raise typer.BadParameter for what does not go together."""
    from .generate import DTYPES

    if (model is None) == (not demo):
        raise typer.BadParameter("give a model or --demo, one of them")
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype is one of {', '.join(DTYPES)}, not {dtype}")


def prompts(
    given: Sequence[str] | None, file: Path | None, demo: bool, demo_count: int
) -> list[str]:
    """Those on the command line and in the file; else, of the demo, so many of its own. Raises
    typer.BadParameter where there are none."""
    texts = list(given or [])
    if file is not None:
        texts += [line for line in file.read_text().splitlines() if line.strip()]
    if demo and not texts:
        from ..demo import model as demo_model
        from .demo import spread

        return spread(list(demo_model.known_prompts()), demo_count)
    if not texts:
        raise typer.BadParameter("give prompts with --prompt or --prompts-file")
    return texts


def pipeline(model: str | None, device: str, dtype: str | None, sampler: str = "ddim") -> Any:
    """The pipeline on its device, silent; the shipped one, with ``sampler``, where no model is
    named."""
    from .generate import load, place
    from .running import quiet

    if model is None:
        from ..demo import model as demo_model

        pipe: Any = demo_model.load(device, scheduler=sampler)
    else:
        pipe = load(model, dtype or ("float32" if device == "cpu" else "float16"))
        place(pipe, device)
    quiet(pipe)
    return pipe
