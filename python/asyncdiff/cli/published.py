"""The parts of a pipeline by their configurations alone, without weights: on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import InputError


def parts_of(model: str, dtype: Any) -> Any:
    """An object that has the models of a pipeline as attributes, and as ``components``, all on the
    meta device; of a denoiser's own configuration that one alone.

    ``model``: a diffusers folder, a denoiser's ``config.json`` or its folder, or an id of the hub,
    of which configurations alone are loaded. Raises InputError where there are none.
    """
    path = Path(model)
    if not path.exists():
        path = _of_hub(model)
    if path.is_dir() and (path / "model_index.json").is_file():
        return _pipeline(path, dtype)
    file = path / "config.json" if path.is_dir() else path
    config = _read(file)
    name = str(config.get("_class_name", ""))
    part = _diffusers(name, config, dtype, file)
    # Whatever it is called: what find_denoiser looks for.
    kind = "unet" if "UNet" in name else "transformer"
    return SimpleNamespace(**{kind: part}, components={kind: part}, vae_scale_factor=8)


def _of_hub(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(model, allow_patterns=["*.json", "*/*.json"])
    except Exception as error:  # no such id, no network, no permission
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot load the configuration of {model!r}: {reason}") from error
    return Path(found)


def _read(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the configuration of {str(file)!r}: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"cannot load the configuration of {str(file)!r}: it is no object")
    return config


def _pipeline(folder: Path, dtype: Any) -> Any:
    parts: dict[str, Any] = {}
    for name, entry in _read(folder / "model_index.json").items():
        file = folder / name / "config.json"
        if not isinstance(entry, list) or not file.is_file():
            continue
        library, kind = (str(e) for e in entry[:2])
        if library == "transformers":
            parts[name] = _transformers(kind, file, dtype)
        else:
            parts[name] = _diffusers(kind, _read(file), dtype, file)
    models = {name: part for name, part in parts.items() if part is not None}
    vae = models.get("vae")
    channels = getattr(getattr(vae, "config", None), "block_out_channels", None)
    scale = 2 ** (len(channels) - 1) if channels else 8
    return SimpleNamespace(**models, components=models, vae_scale_factor=scale)


def _diffusers(name: str, config: dict[str, Any], dtype: Any, file: Path) -> Any:
    import diffusers
    import torch

    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        raise InputError(f"cannot load the configuration of {str(file)!r}: no class {name!r}")
    with torch.device("meta"):
        part = kind.from_config(config)
    return _settled(part, dtype)


def _transformers(name: str, file: Path, dtype: Any) -> Any:
    import torch
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None or not hasattr(kind, "config_class"):  # a tokenizer, or another's class
        return None
    with torch.device("meta"):
        part = kind(kind.config_class.from_json_file(str(file)))
    return _settled(part, dtype)


def _settled(part: Any, dtype: Any) -> Any:
    """In eval mode and of this dtype, if it is a model."""
    import torch

    if not isinstance(part, torch.nn.Module):
        return None
    # diffusers' own .to() warns about precision that no weights have here.
    torch.nn.Module.to(part, dtype)
    return part.eval().requires_grad_(False)
