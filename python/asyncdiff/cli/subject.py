"""What a command draws with: a pipeline of the user's, or the shipped one, its sampler, prompts and
size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from . import console
from .failures import asked_of

DTYPES = ("float32", "float16", "bfloat16")
#: Short names of schedulers of diffusers.
SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpm": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}

Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="What to draw; may be given several times."),
]
PromptsFile = Annotated[
    Path | None, typer.Option(help="Prompts, one a line.", exists=True, dir_okay=False)
]


@dataclass(frozen=True)
class Picture:
    """How pictures are drawn: arguments of the pipeline's call, and its sampler."""

    sampler: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(SAMPLERS)}, or a scheduler class of diffusers that suits the model "
            "(default: the model's own)."
        ),
    ] = None
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale (default: the pipeline's own).")
    ] = None
    height: Annotated[int | None, typer.Option(help="Pixels (default: the model's own).")] = None
    width: Annotated[int | None, typer.Option(help="Pixels (default: the model's own).")] = None

    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, where they are given."""
        asked = {"guidance_scale": self.guidance, "height": self.height, "width": self.width}
        return {k: v for k, v in asked.items() if v is not None}


@dataclass(frozen=True)
class Model:
    """Which pipeline, and how it is loaded."""

    model: Annotated[
        str | None, typer.Argument(help="A diffusers folder, or an id of the hub.")
    ] = None
    demo: Annotated[bool, typer.Option("--demo", help="Take the shipped model.")] = False
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16 (default: float16 on GPUs).")
    ] = None
    load: Annotated[
        list[str] | None,
        typer.Option(
            "--load",
            help="An argument of from_pretrained, as variant=fp16 or text_encoder_3=null (SD3 "
            "without T5). May be repeated.",
        ),
    ] = None

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.model or "the shipped model (asyncdiff.demo)"

    def check(self) -> None:
        """Raise typer.BadParameter for what does not go together."""
        if (self.model is None) == (not self.demo):
            raise typer.BadParameter("give a model or --demo, one of them")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise typer.BadParameter(f"--dtype is one of {', '.join(DTYPES)}, not {self.dtype}")
        if self.demo and self.load:
            raise typer.BadParameter("--load is for models that are loaded, not for --demo")
        read_load(self.load)

    def announce(self) -> None:
        """Say what is loaded, before torch is: that alone takes seconds."""
        console.remark(f"loading {self.name}")

    def pipeline(self, device: str, sampler: str | None = None) -> Any:
        """The pipeline on its device, silent. Raises InputError where it cannot be had."""
        import torch

        dtype = self.dtype or ("float16" if device.startswith("cuda") and self.model else "float32")
        if self.model is None:
            from ..demo import model as demo_model

            # Some are made for the shipped model, without the clipping that harms it.
            own = sampler if sampler in ("dpm", "euler") else "ddim"
            pipe: Any = demo_model.load("cpu", getattr(torch, dtype), own)
            sampler = None if sampler in (own, None) else sampler
        else:
            pipe = load(self.model, getattr(torch, dtype), read_load(self.load))
        if sampler is not None:
            set_sampler(pipe, sampler)
        place(pipe, device)
        if hasattr(pipe, "set_progress_bar_config"):  # ours is on stderr and vanishes when done
            pipe.set_progress_bar_config(disable=True)
        return pipe


def read_load(texts: Sequence[str] | None) -> dict[str, Any]:
    """``variant=fp16`` as arguments; what is JSON (null, true, 3) as that. Raises
    typer.BadParameter."""
    out: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise typer.BadParameter(f"--load {text!r}: write NAME=VALUE, as variant=fp16")
        try:
            out[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            out[name.strip()] = value
    return out


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

        return chosen(list(demo_model.known_prompts()), demo_count)
    if not texts:
        raise typer.BadParameter("give prompts with --prompt or --prompts-file")
    return texts


def chosen(names: list[str], count: int) -> list[str]:
    """``count`` of the names, evenly spread over the list (which is sorted by group)."""
    if len(names) <= count:
        return names
    return [names[i * len(names) // count] for i in range(count)]


def load(model: str, dtype: Any, options: dict[str, Any]) -> Any:
    """The pipeline, in host memory. Raises InputError where there is none of that name."""
    from ..demo.model import is_saved

    if is_saved(model):
        from ..demo.pipeline import EmojiPipeline

        kind: Any = EmojiPipeline
    else:
        from diffusers import DiffusionPipeline

        kind = DiffusionPipeline
    try:
        return kind.from_pretrained(model, **{dtype_argument(): dtype}, **options)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        # No such folder or id, no network, not a pipeline, an argument that it does not take.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load {model!r} as a diffusers pipeline: {reason}") from error


def dtype_argument() -> str:
    """What diffusers calls the dtype to load in: ``dtype`` where it warns of the older name."""
    from diffusers.pipelines import pipeline_utils

    return "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"


def set_sampler(pipe: Any, name: str) -> None:
    """Give the pipeline another scheduler, made of the configuration of its own. Raises InputError
    for one that there is not, or that its model is not for."""
    import diffusers

    wanted = SAMPLERS.get(name, name)
    kind, old = getattr(diffusers, wanted, None), pipe.scheduler
    kinds = {*getattr(old, "compatibles", []), type(old)}
    # Not those of higher order, which call the denoiser several times a step; nor stand-ins for
    # what is not installed, which have no order.
    fitting = sorted(c.__name__ for c in kinds if vars(c).get("order") == 1)
    if kind is None or wanted not in fitting:
        short = [key for key, full in SAMPLERS.items() if full in fitting]
        raise InputError(
            f"--sampler {name} does not suit this model; those that do: "
            f"{', '.join([*short, *fitting])}"
        )
    with asked_of(wanted):
        pipe.scheduler = kind.from_config(old.config)


def place(pipe: Any, device: str) -> None:
    """Move the pipeline. Raises InputError where the device does not exist here."""
    try:
        pipe.to(device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by how it was built
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot use {device}: {reason}") from error
