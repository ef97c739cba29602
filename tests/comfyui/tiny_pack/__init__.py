"""A pack of nodes for ComfyUI's server: a tiny model in the place of a loader and text encoders."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import CONTEXT, sd15


class TinyModel:
    """A MODEL of SD 1.5's layout with random weights, and two conditions for it."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """None."""
        return {"required": {}}

    def load(self) -> tuple[Any, Any, Any]:
        """The same at every call."""
        random = torch.Generator().manual_seed(0)
        positive, negative = ([[torch.randn(1, 7, CONTEXT, generator=random), {}]] for _ in "pn")
        return sd15(), positive, negative


NODE_CLASS_MAPPINGS = {"TinyModel": TinyModel}
