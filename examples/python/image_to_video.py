"""A picture that moves, by Stable Video Diffusion on two devices.

python examples/python/image_to_video.py
"""

from __future__ import annotations

import diffusers
import torch
from tiny import TEXT
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import asyncdiff

FRAMES = 4

torch.manual_seed(4)
unet = diffusers.UNetSpatioTemporalConditionModel(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    layers_per_block=1,
    num_attention_heads=(2, 4),
    cross_attention_dim=TEXT,
    addition_time_embed_dim=32,
    projection_class_embeddings_input_dim=96,
    num_frames=FRAMES,
    sample_size=8,
)
vae = diffusers.AutoencoderKLTemporalDecoder(
    block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
)
looks = CLIPVisionModelWithProjection(
    CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=TEXT,
    )
)
scheduler = diffusers.EulerDiscreteScheduler(
    prediction_type="v_prediction", use_karras_sigmas=True, timestep_type="continuous",
    beta_schedule="scaled_linear", sigma_min=0.002, sigma_max=700.0,
)  # fmt: skip
pipe = diffusers.StableVideoDiffusionPipeline(
    vae=vae.eval(),
    image_encoder=looks.eval(),
    unet=unet.eval(),
    scheduler=scheduler,
    feature_extractor=CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ),
)
handle = asyncdiff.parallelize(pipe, ["cpu"] * 2)

picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
frames = pipe(
    picture,
    height=32,
    width=32,
    num_frames=FRAMES,
    num_inference_steps=12,
    decode_chunk_size=2,
    generator=torch.Generator().manual_seed(0),
    output_type="np",
).frames[0]

print(handle.settings)
print(handle.report())
print(f"a picture moves for {len(frames)} frames of {frames.shape[2]} x {frames.shape[1]} pixels")
handle.restore()
