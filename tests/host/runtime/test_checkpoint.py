"""Denoisers whose ranks read their weights from a checkpoint: bits, memory, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import group_weights
import pytest
import torch
from diffusers import UNet2DConditionModel
from group import run
from group_failures import SPLIT, alone, loop
from safetensors.torch import save_file, save_model
from tiny_pipelines import draw, tiny_sd
from toys import Toy, toy, toy_call

import asyncdiff
from asyncdiff import AsyncDenoiser, InputError


def test_bits(tmp_path: Path) -> None:
    due = alone()
    for found in run(group_weights.bits, 2, tmp_path):
        for name in ("meta", "whole"):
            assert found[f"{name} {SPLIT}"] == due
            assert found[f"{name} auto empty"] and found[f"{name} {SPLIT} empty"]
        assert found["restored"] and found["shared"]


@pytest.mark.slow
def test_no_process_holds_more_than_its_component(tmp_path: Path) -> None:
    for found in run(group_weights.memory, 2, tmp_path, ["96"]):
        assert found["component"] > 150 * 2**20
        assert found["grown"] < 1.2 * found["component"], found


@pytest.mark.slow
@pytest.mark.parametrize("split", ["auto", "estimate"])
def test_one_process_holds_each_component_once(split: str, tmp_path: Path) -> None:
    """Through the one-call drop-in, on two devices whose memory is the host's: what is measured of
    a FLUX, too, is brought a part at a time."""
    (found,) = run(group_weights.drop_in, 1, tmp_path, [split])
    whole, parts = found["whole"], found["components"]
    assert whole > 300 * 2**20 and max(parts) < 0.7 * whole
    # What both components have, a weight of theirs or two, is there once.
    assert whole <= sum(parts) < 1.1 * whole
    assert 0.9 * whole < found["grown"] < 1.2 * whole, found
    assert sum(parts) < found["estimated"] < 1.3 * sum(parts)
    assert found["finite"] and found["meta"]


def test_one_process_reads_them_too(tmp_path: Path) -> None:
    """In several files, in another dtype."""
    state = {k: v.float() for k, v in toy().state_dict().items() if k != "down.2.weight"}
    names = sorted(state)
    index = {}
    for i, part in enumerate((names[:5], names[5:])):
        save_file({n: state[n] for n in part}, tmp_path / f"m-{i}.safetensors")
        index |= dict.fromkeys(part, f"m-{i}.safetensors")
    text = json.dumps({"weight_map": index})
    (tmp_path / "m.safetensors.index.json").write_text(text)
    module = group_weights.on_meta(Toy).double()
    denoiser = AsyncDenoiser(module, devices=["cpu"] * 2, split=SPLIT, checkpoint=tmp_path)
    got = loop(denoiser, toy_call())
    denoiser.close()
    rounded = toy()
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(weight.float())
    assert got == loop(AsyncDenoiser(rounded, devices=["cpu"] * 2, split=SPLIT), toy_call())


def _other(module: Toy) -> Toy:
    with torch.no_grad():
        module.mix.weight.add_(1)
    return module


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: _other(toy()), {}, "mix.weight has other values there"),
        (lambda: Toy(width=16).double().eval(), {}, r"is \(8, 4, 3, 3\) there, \(16, 4"),
        (lambda: Toy(depth=4).double().eval(), {}, r"has no down\."),
        (toy, {"checkpoint": "nowhere"}, "there is no such file"),
        (toy, {"guidance": "split", "devices": ["cpu"] * 4}, "no process has it"),
    ],
)
def test_refused(make: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_model(toy(), str(tmp_path / "toy.safetensors"))
    module = make()
    before = list(module.parameters())
    settings = {"devices": ["cpu"] * 2, "checkpoint": tmp_path} | options
    with pytest.raises(InputError, match=message):
        AsyncDenoiser(module, split=SPLIT, example_kwargs=toy_call(), **settings)
    kept = zip(module.parameters(), before, strict=True)
    assert all(torch.equal(a, b) and a.device.type == "cpu" for a, b in kept)


@pytest.mark.parametrize("split", ["auto", SPLIT])
def test_weights_without_values_and_without_checkpoint(split: Any) -> None:
    denoiser = AsyncDenoiser(toy().to("meta"), devices=["cpu"] * 2, split=split)
    with pytest.raises(InputError, match=r"has no values .* which file has them \(checkpoint\)"):
        loop(denoiser, toy_call())
    denoiser.module.to_empty(device="cpu").load_state_dict(toy().state_dict())
    found = loop(denoiser, toy_call())
    assert split == "auto" or found == alone()
    denoiser.close()


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    save_model(toy(), str(tmp_path / "a.safetensors"))
    save_model(toy(), str(tmp_path / "b.safetensors"))
    with pytest.raises(InputError, match=r"both a.safetensors and b.safetensors have"):
        AsyncDenoiser(toy(), devices=["cpu"] * 2, checkpoint=tmp_path)
    (tmp_path / "c.safetensors").write_bytes(b"\xff" * 7)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        AsyncDenoiser(toy(), devices=["cpu"] * 2, checkpoint=tmp_path / "c.safetensors")


def test_a_pipeline_without_its_denoisers_weights(tmp_path: Path) -> None:
    """The denoiser is on the meta device, and its pipeline moved once it is parallelised."""
    pipe, call = tiny_sd()
    pipe.unet.save_pretrained(tmp_path / "unet")
    with asyncdiff.parallelize(pipe, ["cpu"] * 2, components=2, split="estimate", warmup=2):
        due = draw(pipe, call)
    with torch.device("meta"):
        pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config).eval()
    where: dict[str, Any] = {"checkpoint": tmp_path / "unet", "split": "estimate"}
    with asyncdiff.parallelize(pipe, ["cpu"] * 2, components=2, warmup=2, **where):
        pipe.to("cpu")
        assert torch.equal(draw(pipe, call), due)
    # Guidance is not split: nobody has the whole denoiser to look what of a batch belongs together.
    with asyncdiff.parallelize(pipe, ["cpu"] * 2, quality="balanced", **where) as handle:
        draw(pipe, call, num_inference_steps=12)
        assert handle.config.guidance == "batched" and handle.config.exact_mode == "chain"
