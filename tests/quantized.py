"""Tiny FLUX transformers with weights of every kind, made or loaded as users do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

#: Of the latents' and the text's tokens.
_IMAGE, _TEXT, _WIDTH = 16, 8, 64


def transformer(dtype: torch.dtype = torch.bfloat16) -> Any:
    """A FLUX transformer whose linear layers are wide enough for blocks of codes."""
    torch.manual_seed(0)
    module = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        pooled_projection_dim=_WIDTH,
        axes_dims_rope=(8, 8, 16),
    )
    return nn.Module.to(module, dtype).eval().requires_grad_(False)


def arguments(dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Keyword arguments of one call."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": draw(1, _IMAGE, 16),
        "encoder_hidden_states": draw(1, _TEXT, _WIDTH),
        "pooled_projections": draw(1, _WIDTH),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.zeros(_IMAGE, 3),
        "txt_ids": torch.zeros(_TEXT, 3),
    }


def pipeline(module: Any) -> tuple[Any, dict[str, Any]]:
    """A pipeline around one of these transformers, and the arguments of a call."""
    encoders = {
        f"{part}{end}": None for part in ("text_encoder", "tokenizer") for end in ("", "_2")
    }
    pipe = diffusers.FluxPipeline(
        transformer=module,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        **encoders,
    )
    pipe.set_progress_bar_config(disable=True)
    given = arguments()
    call = {
        "prompt_embeds": given["encoder_hidden_states"],
        "pooled_prompt_embeds": given["pooled_projections"],
        "latents": given["hidden_states"][:, :4],
    }
    size = {"height": 32, "width": 32, "num_inference_steps": 3}
    return pipe, call | size | {"output_type": "latent"}


def torchao(kind: str, folder: Path) -> Any:
    """Quantised by torchao, loaded from a folder."""
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    configs = {
        "int8": ao.Int8WeightOnlyConfig,
        "int8 dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        "float8": ao.Float8WeightOnlyConfig,
        "float8 dynamic": ao.Float8DynamicActivationFloat8WeightConfig,
    }
    transformer().save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        # Torchao quantises activations in float8 on GPUs only; torch has the product for CPUs, too.
        patch.setattr(ao.quant_api, "_check_hardware_support", lambda *_: None)
        return diffusers.FluxTransformer2DModel.from_pretrained(
            folder,
            quantization_config=diffusers.TorchAoConfig(configs[kind]()),
            torch_dtype=torch.bfloat16,
        ).eval()


def gguf(kind: str, folder: Path) -> Any:
    """From a GGUF file: linear layers quantised, all else in float32."""
    package = pytest.importorskip("gguf", reason="gguf is not installed")
    module = transformer(torch.float32)
    module.save_pretrained(folder)
    linear = {f"{n}.weight" for n, x in module.named_modules() if isinstance(x, nn.Linear)}
    writer = package.GGUFWriter(folder / "tiny.gguf", "flux")
    for name, weight in module.state_dict().items():
        value, codes = weight.numpy(), package.GGMLQuantizationType[kind]
        block, size = package.GGML_QUANT_SIZES[codes]
        if name in linear and weight.shape[1] % block == 0:
            if kind == "Q4_K":  # which the package reads only
                packed = _random_blocks(len(value), weight.shape[1] // block, size)
            else:
                packed = package.quantize(value, codes)
            writer.add_tensor(name, packed, raw_dtype=codes)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return diffusers.FluxTransformer2DModel.from_single_file(
        str(folder / "tiny.gguf"),
        config=str(folder),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.bfloat16),
        torch_dtype=torch.bfloat16,
    ).eval()


def _random_blocks(rows: int, blocks: int, size: int) -> np.ndarray:
    """Codes of Q4_K that are finite: each block begins with two scales in half precision."""
    packed = np.random.default_rng(0).integers(0, 64, (rows, blocks, size), dtype=np.uint8)
    packed[..., :4] = np.array([1e-4, 1e-4], dtype=np.float16).view(np.uint8)
    return packed.reshape(rows, blocks * size)


def bitsandbytes(kind: str, device: str = "cpu") -> Any:
    """With the layers of bitsandbytes, which diffusers makes on GPUs only."""
    bnb = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes, of 43 MB, is not installed for tests"
    )
    module = transformer()
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, nn.Linear) or layer.in_features % 64 != 0:
            continue
        size = layer.in_features, layer.out_features, layer.bias is not None
        if kind == "nf4":
            made = bnb.nn.Linear4bit(*size, compute_dtype=torch.bfloat16, quant_type="nf4")
            made.support_avx512bf16_for_cpu = False  # or its layout depends on the processor
        else:
            made = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=0.0)
        made.load_state_dict(layer.state_dict())
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, made)
    return module.to(device).eval().requires_grad_(False)


def quanto(kind: str) -> Any:
    """Quantised by optimum-quanto."""
    package = pytest.importorskip(
        "optimum.quanto", reason="optimum-quanto is not installed for tests"
    )
    module = transformer()
    package.quantize(module, weights=getattr(package, kind))
    package.freeze(module)
    return module


def cast_by_layer(_: Path) -> Any:
    """With diffusers' layerwise casting: stored in float8, computed in bfloat16."""
    module = transformer()
    module.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    return module


class _Wide(nn.Module):
    """A layer that computes in float32."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.float()).to(x.dtype)


def mixed(_: Path) -> Any:
    """In bfloat16, some layers in float32."""
    module = transformer()
    module.proj_out = _Wide(module.proj_out)
    module.transformer_blocks[0].ff.net[2] = _Wide(module.transformer_blocks[0].ff.net[2])
    return module


#: How each kind is made in a folder, and about how many bytes a linear layer has for a weight.
KINDS: dict[str, tuple[Any, float]] = {
    "torchao int8": (lambda folder: torchao("int8", folder), 1.0),
    "torchao int8 dynamic": (lambda folder: torchao("int8 dynamic", folder), 1.0),
    "torchao float8": (lambda folder: torchao("float8", folder), 1.0),
    "torchao float8 dynamic": (lambda folder: torchao("float8 dynamic", folder), 1.0),
    "GGUF Q8_0": (lambda folder: gguf("Q8_0", folder), 34 / 32),
    "GGUF Q4_0": (lambda folder: gguf("Q4_0", folder), 18 / 32),
    "GGUF Q4_K": (lambda folder: gguf("Q4_K", folder), 144 / 256),
    "GGUF BF16": (lambda folder: gguf("BF16", folder), 2.0),
    "layerwise casting": (cast_by_layer, 1.0),
    "mixed dtypes": (mixed, 4.0),
    "quanto int8": (lambda _: quanto("qint8"), 1.0),
    "quanto float8": (lambda _: quanto("qfloat8"), 1.0),
    "quanto int4": (lambda _: quanto("qint4"), 0.5),
    "bitsandbytes nf4": (lambda _: bitsandbytes("nf4"), 0.5),
    "bitsandbytes int8": (lambda _: bitsandbytes("int8"), 1.0),
}
