"""What others hung on a denoiser's layers that an export would drop, or freeze as it then is."""

from __future__ import annotations

from torch import nn

from ..errors import InputError


def check_hooks(module: nn.Module) -> None:
    """Raise InputError where hooks change what layers do from call to call."""
    for child in module.modules():
        attributes = vars(child)
        if "_hf_hook" in attributes:
            raise InputError(
                "the denoiser is offloaded by accelerate: call pipe.remove_all_hooks() and move "
                "the pipeline to a device first"
            )
        # An empty registry is left behind where hooks were, or might have been.
        hooks = getattr(attributes.get("_diffusers_hook"), "hooks", None)
        if hooks:
            raise InputError(
                f"layers of the denoiser have hooks of diffusers ({', '.join(hooks)}), for "
                "caching, offloading or casting: asyncdiff does not serve them. Undo that first "
                "(disable_cache()), or load the pipeline without it"
            )
