"""Train the small text-to-emoji denoiser that asyncdiff ships.

    python examples/emoji/prepare.py
    python examples/emoji/train.py --minutes 8.3 --out out/emoji/run      # on one data-centre GPU
    python examples/emoji/train.py --steps 3 --batch 4 --out out/emoji/t  # does it run? (CPU)

Training stops by the clock, so that it fits short GPU runs. The folder ``--out`` receives
``model.safetensors`` (averaged weights, in eight bits), ``config.json`` and ``training.json``,
every two minutes and at the end, and then ``sheet.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pixel_unshuffle

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

from diffusers import UNet2DConditionModel

from asyncdiff.demo import weights as eight_bit
from asyncdiff.demo.pipeline import EmojiPipeline, make_scheduler
from asyncdiff.demo.words import Vocabulary, WordEncoder

# Stable Diffusion's schedule with a larger end, so that the last step is nearly pure noise (0.0095
# of the signal remains): otherwise a model that starts from noise cannot make a white page.
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.0225,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def make_unet(patch: int, channels: list[int], layers: int, width: int) -> UNet2DConditionModel:
    down = ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (len(channels) - 1)
    up = ["CrossAttnUpBlock2D"] * (len(channels) - 1) + ["UpBlock2D"]
    return UNet2DConditionModel(
        sample_size=64 // patch,
        in_channels=3 * patch * patch,
        out_channels=3 * patch * patch,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        cross_attention_dim=width,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
    )


class Model(nn.Module):
    """The denoiser and its word encoder, trained together."""

    def __init__(self, unet: UNet2DConditionModel, word_encoder: WordEncoder) -> None:
        super().__init__()
        self.unet, self.word_encoder = unet, word_encoder

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        states = self.word_encoder(tokens)
        predicted: Tensor = self.unet(noisy, t, encoder_hidden_states=states, return_dict=False)[0]
        return predicted


def rate_at(share: float, step: int, warmup: int) -> float:
    """Learning rate as a share of its peak: a short rise, flat, from 40 % on a cosine to 2 %."""
    fall = max(0.0, min(1.0, (share - 0.4) / 0.6))
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fall)))


def save_model(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    eight_bit.save(weights, folder / "model.safetensors.part")
    (folder / "model.safetensors.part").rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def sheet(pipe: EmojiPipeline, prompts: list[str], path: Path, steps: int) -> None:
    """One labelled picture of what the model draws for ``prompts`` (seed i for the i-th)."""
    from PIL import Image, ImageDraw, ImageFont

    columns, cell, line = 10, 96, 9
    rows = -(-len(prompts) // columns)
    page = Image.new("RGB", (columns * cell, rows * (cell + 4 * line)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(line)
    for start in range(0, len(prompts), 30):
        part = prompts[start : start + 30]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        pictures = pipe(part, num_inference_steps=steps, generator=generators).images
        for i, (prompt, picture) in enumerate(zip(part, pictures, strict=True), start):
            x, y = i % columns * cell, i // columns * (cell + 4 * line)
            page.paste(picture.resize((80, 80), Image.Resampling.LANCZOS), (x + 8, y + 4))
            words, lines = prompt.split(), [""]
            for word in words:
                if draw.textlength(f"{lines[-1]} {word}", font=font) > cell - 4:
                    lines.append("")
                lines[-1] = f"{lines[-1]} {word}".strip()
            for n, text in enumerate(lines[:4]):
                draw.text(
                    (x + cell / 2, y + 88 + n * line), text, fill="black", font=font, anchor="mm"
                )
    page.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("out/emoji/emoji.npz"))
    parser.add_argument("--out", type=Path, default=Path("out/emoji/run"))
    parser.add_argument("--minutes", type=float, default=8.3, help="compilation included")
    parser.add_argument("--steps", type=int, help="end after so many steps, if the clock allows")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 96, 160])
    parser.add_argument("--layers", type=int, default=1, help="residual blocks a level")
    parser.add_argument("--patch", type=int, default=2, help="pixel blocks folded into channels")
    parser.add_argument("--width", type=int, default=128, help="width of the word states")
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    parser.add_argument("--prompts", type=int, default=60, help="pictures on the sheet")
    args = parser.parse_args()

    begun = last_save = time.monotonic()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)

    data = np.load(args.data)
    captions = [str(c) for c in data["captions"]]
    vocabulary = Vocabulary(sorted({word for caption in captions for word in caption.split()}))
    pictures = torch.from_numpy(data["pictures"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    pictures = pixel_unshuffle(pictures, args.patch).to(device)
    tokens = vocabulary(captions).to(device)
    nothing = vocabulary([""]).to(device)

    shape = {"length": vocabulary.length, "width": args.width}
    model = Model(
        make_unet(args.patch, args.channels, args.layers, args.width),
        WordEncoder(vocabulary.words, **shape, depth=1),
    ).to(device, memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in model.parameters())
    average = {name: w.detach().clone() for name, w in model.state_dict().items()}
    average_list, current_list = list(average.values()), list(model.state_dict().values())
    stepper = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    config = {
        "unet": {k: v for k, v in dict(model.unet.config).items() if not k.startswith("_")},
        "word_encoder": {**shape, "layers": 1},
        "scheduler": SCHEDULE,
        "words": vocabulary.words,
        "captions": captions,
        "source": str(data["source"]),
    }
    summary: dict[str, Any] = {
        "parameters": parameters,
        "pictures": len(captions),
        "words": len(vocabulary.words),
        "batch": args.batch,
        "learning_rate": args.lr,
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(summary), flush=True)

    kept = make_scheduler("ddim", SCHEDULE).alphas_cumprod.to(device)
    signal, noise_share = kept.sqrt().view(-1, 1, 1, 1), (1 - kept).sqrt().view(-1, 1, 1, 1)
    predict = torch.compile(model, dynamic=False) if device.type == "cuda" else model
    log: list[dict[str, float]] = []
    window: list[Tensor] = []
    order = torch.empty(0, dtype=torch.long, device=device)
    step = 0

    def note_loss() -> None:
        loss = torch.stack(window).mean().item()
        if not math.isfinite(loss):
            raise SystemExit(f"the loss became {loss} at step {step}")
        seconds = time.monotonic() - begun
        log.append({"step": step, "seconds": round(seconds, 1), "loss": round(loss, 5)})
        window.clear()
        print(f"step {step}  {seconds:.0f} s  loss {loss:.4f}", flush=True)

    def save() -> None:
        save_model(args.out, average, config)
        summary.update(
            steps=step,
            samples=step * args.batch,
            seconds=round(time.monotonic() - begun, 1),
            final_loss=log[-1]["loss"] if log else None,
            log=log,
        )
        (args.out / "training.json").write_text(json.dumps(summary) + "\n")

    while (spent := time.monotonic() - begun) < args.minutes * 60 and step != args.steps:
        share = max(spent / (args.minutes * 60), step / args.steps if args.steps else 0.0)
        stepper.param_groups[0]["lr"] = args.lr * rate_at(share, step, 500)
        while len(order) < args.batch:
            order = torch.cat([order, torch.randperm(len(captions), device=device)])
        chosen, order = order[: args.batch], order[args.batch :]
        clean = pictures[chosen].to(memory_format=torch.channels_last)
        # One timestep from each of `batch` equal slices: the loss varies less from step to step.
        slices = torch.randperm(args.batch, device=device)
        spread = (slices + torch.rand(args.batch, device=device)) / args.batch
        t = (spread * len(kept)).long().clamp(max=len(kept) - 1)
        noise = torch.randn_like(clean)
        noisy = signal[t] * clean + noise_share[t] * noise
        target = signal[t] * noise - noise_share[t] * clean
        # A tenth goes without a caption, for guidance.
        row = torch.where(torch.rand(args.batch, 1, device=device) < 0.1, nothing, tokens[chosen])
        with torch.autocast(device.type, torch.bfloat16):
            predicted = predict(noisy, t, row)
        loss = mse_loss(predicted.float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        step += 1
        decay = min(args.ema, step / (step + 9))
        torch._foreach_lerp_(average_list, current_list, 1 - decay)
        window.append(loss.detach())
        if len(window) == 200:
            note_loss()
        if time.monotonic() - last_save > args.save_every:
            save()
            last_save = time.monotonic()
    if window:
        note_loss()
    save()

    model.load_state_dict(average)
    model.eval().requires_grad_(False)
    scheduler = make_scheduler("ddim", SCHEDULE)
    pipe = EmojiPipeline(model.unet, scheduler, model.word_encoder)
    pipe.set_progress_bar_config(disable=True)
    chosen_captions = captions[:: max(1, len(captions) // args.prompts)][: args.prompts]
    sheet(pipe, chosen_captions, args.out / "sheet.png", steps=50)
    print(f"sheet written, {time.monotonic() - begun:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
