"""The text-to-emoji model that comes with asyncdiff, as a diffusers pipeline. Needs no network.

    from asyncdiff import demo
    pipe = demo.load()
    pipe("smiling face with sunglasses").images[0].save("emoji.png")
    pipe.save_pretrained("emoji")
    pipe = demo.EmojiPipeline.from_pretrained("emoji")

It draws 64 x 64 pictures from a closed vocabulary; ``known_prompts()`` lists the prompts that it
draws well. How it was made: examples/emoji/README.md. What it draws well and badly:
docs/guide/shipped_model.md.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asyncdiff.errors import InputError

if TYPE_CHECKING:
    from asyncdiff.demo.pipeline import EmojiPipeline, EmojiPipelineOutput

__all__ = ["EmojiPipeline", "EmojiPipelineOutput", "captions", "known_prompts", "load"]


@cache
def _config() -> dict[str, Any]:
    text = (resources.files("asyncdiff.demo") / "config.json").read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    return config


def _pipeline_module() -> Any:
    try:
        import diffusers  # noqa: F401
        import safetensors  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the emoji model needs diffusers and safetensors ({error}): "
            "pip install 'asyncdiff[demo]'"
        ) from error
    from asyncdiff.demo import pipeline

    return pipeline


def __getattr__(name: str) -> Any:
    if name in ("EmojiPipeline", "EmojiPipelineOutput"):
        return getattr(_pipeline_module(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def known_prompts() -> list[str]:
    """Prompts whose picture was looked at and found right."""
    return list(_config()["known_prompts"])


def captions() -> list[str]:
    """Every caption that the model was trained on, those that are no good prompts included."""
    return list(_config()["captions"])


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, scheduler: str = "ddim"
) -> EmojiPipeline:
    """The shipped model as a pipeline on ``device``.

    ``scheduler`` is "ddim", "dpm" (DPM-Solver++) or "euler".
    """
    module = _pipeline_module()
    from diffusers import UNet2DConditionModel

    from asyncdiff.demo import weights as eight_bit
    from asyncdiff.demo.words import WordEncoder

    config = _config()
    sampler = module.make_scheduler(scheduler, config["scheduler"])
    unet = UNet2DConditionModel.from_config(config["unet"])
    shape = config["word_encoder"]
    word_encoder = WordEncoder(
        config["words"], shape["length"], shape["width"], depth=shape["layers"]
    )
    with resources.as_file(resources.files("asyncdiff.demo") / "model.safetensors") as path:
        weights = eight_bit.load(path)
    for name, part in (("unet.", unet), ("word_encoder.", word_encoder)):
        part.load_state_dict(
            {key[len(name) :]: w for key, w in weights.items() if key.startswith(name)}
        )
        # Not part.to(): diffusers' own warns about casting even where nothing is cast.
        torch.nn.Module.to(part, device=device, dtype=dtype).eval().requires_grad_(False)
    pipe: EmojiPipeline = module.EmojiPipeline(unet, sampler, word_encoder)
    return pipe


def is_saved(folder: str | Path) -> bool:
    """Whether the shipped model, or one like it, was saved to this folder."""
    try:
        index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and index.get("_class_name") == "EmojiPipeline"
