"""Which parts of a pipeline are its denoisers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...errors import InputError

#: What most pipelines call them; a second one, for the later steps, has the same name and _2.
_NAMES = ("unet", "transformer")
#: Parts that take a timestep, too, and denoise nothing by themselves.
_BESIDES = ("controlnet", "vae", "vqgan", "adapter", "connectors")


def find_denoisers(pipe: Any, named: str | Sequence[str] | None = None) -> dict[str, nn.Module]:
    """A pipeline's denoisers by name, in the order of the steps that they have: those that are
    ``named``, else ``unet`` or ``transformer`` (and ``transformer_2``), else the one part whose
    forward takes a timestep. Raises InputError where there is none, or it is not clear which."""
    if named is not None:
        names = [named] if isinstance(named, str) else list(named)
        for name in names:
            if not isinstance(getattr(pipe, name, None), nn.Module):
                known = ", ".join(_like_denoisers(pipe)) or "none that takes a timestep"
                raise InputError(
                    f"denoiser={name!r}: {type(pipe).__name__} has no model of that name; it has "
                    f"{known}"
                )
        return {name: getattr(pipe, name) for name in names}
    for name in _NAMES:
        both = {n: getattr(pipe, n, None) for n in (name, f"{name}_2")}
        found = {n: module for n, module in both.items() if isinstance(module, nn.Module)}
        if found:
            return found
    candidates = _like_denoisers(pipe)
    if len(candidates) == 1:
        return candidates
    kind = type(pipe).__name__
    if candidates:
        names = list(candidates)
        raise InputError(
            f"{kind} has several models that take a timestep ({', '.join(names)}): say which is "
            f"to be spread, parallelize(pipe, denoiser={names[0]!r})"
        )
    parts = [n for n, part in getattr(pipe, "__dict__", {}).items() if hasattr(part, "components")]
    inside = f", or parallelise the pipeline inside of it ({', '.join(parts)})" if parts else ""
    raise InputError(
        f"{kind} has neither .unet nor .transformer, nor another model that takes a timestep: use "
        f"asyncdiff.AsyncDenoiser on its denoiser{inside}"
    )


def find_denoiser(pipe: Any) -> nn.Module:
    """The denoiser of a pipeline; that of the first steps, where others have the later ones.
    Raises what :func:`find_denoisers` does."""
    return next(iter(find_denoisers(pipe).values()))


def _like_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Models of a pipeline whose forward takes a timestep."""
    parts = getattr(pipe, "components", None)
    everything = parts if isinstance(parts, Mapping) else getattr(pipe, "__dict__", {})
    return {
        name: module
        for name, module in everything.items()
        if isinstance(module, nn.Module)
        and not any(word in name for word in _BESIDES)
        and any(p.startswith("timestep") for p in inspect.signature(module.forward).parameters)
    }
