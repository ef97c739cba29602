"""A LoRA on a parallelised pipeline; its strength is changed between two pictures.

python examples/python/lora.py          (pip install peft)
"""

from __future__ import annotations

import diffusers
import torch
from peft import LoraConfig
from tiny import parts, text, unchecked

import asyncdiff

pipe = diffusers.StableDiffusionPipeline(**parts(), **unchecked())
# In the place of pipe.load_lora_weights("path/or/id", adapter_name="style"):
layers = ["to_q", "to_v"]
pipe.unet.add_adapter(LoraConfig(r=4, target_modules=layers, init_lora_weights=False), "style")

handle = asyncdiff.parallelize(pipe, ["cpu"] * 2)


def draw(strength: float) -> torch.Tensor:
    """The latents of one picture, from the same noise."""
    pipe.unet.set_adapters(["style"], [strength])  # of a loaded one: pipe.set_adapters
    noise = torch.Generator().manual_seed(0)
    call = {**text(), "height": 16, "width": 16, "num_inference_steps": 12}
    return pipe(**call, generator=noise, output_type="latent").images


# Another strength is noticed when the next generation begins; nothing is prepared for it.
without, with_style, again = draw(0.0), draw(1.0), draw(0.0)
print(f"the LoRA changes the latents by {(with_style - without).norm() / without.norm():.0%}")
print(f"and without it they are the same again: {torch.equal(without, again)}")
handle.restore()
