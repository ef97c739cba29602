"""The shipped text-to-emoji model: weights, word encoder, pipeline.

from asyncdiff import demo
demo.load()("smiling face with sunglasses").images[0].save("emoji.png")
"""

from __future__ import annotations

from typing import Any

from .model import captions, known_prompts, load

__all__ = ["captions", "known_prompts", "load"]


def __getattr__(name: str) -> Any:
    if name in ("EmojiPipeline", "EmojiPipelineOutput"):  # diffusers takes seconds to import
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
