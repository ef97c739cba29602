"""ComfyUI changes weights, loads and unloads them: ranks follow."""

from __future__ import annotations

import gc
import importlib
from typing import Any

import pytest

pytest.importorskip("comfy", reason="COMFYUI names no folder of ComfyUI")
import comfy.model_management as management
import torch
from tiny_models import CPU, LOADED, sample


def lora(model: Any, strength: float = 1.0) -> Any:
    """A clone with other values for the weights of every attention."""
    other = model.clone()
    random = torch.Generator().manual_seed(1)
    patches = {
        name: ("diff", (0.2 * torch.randn(weight.shape, generator=random),))
        for name, weight in model.model.state_dict().items()
        if ".attn" in name
    }
    assert other.add_patches(patches, strength)
    return other


def host(pack: Any, model: Any) -> Any:
    return importlib.import_module(f"{pack.__name__}.host").host_of(model.model)


def check(plain: torch.Tensor, split: torch.Tensor) -> None:
    assert (plain - split).abs().max() <= 1e-4 * plain.std()


def test_a_lora_behind_the_node_keeps_the_engine(model: Any, spread: Any, pack: Any) -> None:
    split = spread(model)
    check(sample(model), sample(split))
    denoiser = host(pack, model)._denoiser
    weak, strong = (sample(lora(model, s)) for s in (0.5, 1.0))
    assert (weak - strong).abs().max() > 0.01 * weak.std()
    check(weak, sample(lora(split, 0.5)))
    check(strong, sample(lora(split)))
    check(sample(model), sample(split))
    assert host(pack, model)._denoiser is denoiser


def test_a_lora_before_the_node(model: Any, spread: Any) -> None:
    check(sample(lora(model)), sample(spread(lora(model))))


def test_plain_runs_between(model: Any, spread: Any) -> None:
    patched = lora(model)
    split = spread(patched)
    plain = sample(patched)
    for each in (split, patched, split, split, patched):
        check(plain, sample(each))
        assert each.model.device == (CPU if each is split else LOADED)


def test_settings_of_two_nodes(model: Any, spread: Any) -> None:
    plain, two, three = sample(model), spread(model), spread(model, devices="cpu cpu cpu")
    for each in (two, three, two):
        check(plain, sample(each))


def test_a_node_behind_another_one_replaces_it(model: Any, spread: Any, pack: Any) -> None:
    split = spread(spread(model), devices="cpu cpu cpu")
    check(sample(model), sample(split))
    assert host(pack, model)._denoiser.config.components == 3


def test_unloading_frees_the_ranks(model: Any, spread: Any, pack: Any) -> None:
    split = spread(model)
    plain = sample(split)
    assert host(pack, model).open
    management.free_memory(1e30, model.load_device)
    assert not host(pack, model).open
    check(plain, sample(split))


def test_a_node_that_is_gone_frees_the_ranks(model: Any, spread: Any, pack: Any) -> None:
    split = spread(model)
    further = lora(split)
    plain = sample(split)
    del split
    gc.collect()
    assert host(pack, model).open
    del further
    gc.collect()
    assert not host(pack, model).open
    check(plain, sample(model))


def test_what_was_loaded_in_part_is_loaded_completely(model: Any, spread: Any) -> None:
    patched = lora(model)
    plain = sample(patched)
    management.free_memory(1e30, model.load_device)
    patched.load(LOADED, lowvram_model_memory=100_000)
    assert patched.model.model_lowvram
    check(plain, sample(spread(patched)))
    assert not patched.model.model_lowvram
