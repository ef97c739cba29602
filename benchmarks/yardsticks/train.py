"""Train a yardstick model on CIFAR-10.

    python benchmarks/yardsticks/train.py unet --data FOLDER --out out/yardsticks/unet --minutes 24
    python benchmarks/yardsticks/train.py transformer --data FOLDER --out out/t --minutes 24
    python benchmarks/yardsticks/train.py unet --data FOLDER --out out/t --steps 3 --batch 8 # a try

Training stops by the clock: ``--minutes`` are those of all runs together, compiling included, of
one data-centre GPU; ``--now`` ends this run earlier, and a run with the same ``--out`` goes on
where it ended. Where the machine is another one by then, ``--start`` takes the folder with what
came back from it (``model.safetensors`` and ``training.json``): the averaged weights go on, with
an optimiser that begins anew. ``--out`` receives ``state.pt`` (to go on), ``model.safetensors``
(averaged weights, in eight bits), ``training.json`` and ``sheet.png``.
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

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asyncdiff.demo import weights
from yardsticks.load import pipeline, scheduler
from yardsticks.models import KINDS, NOTHING, make
from yardsticks.pictures import CLASSES, read
from yardsticks.sheet import draw

DROPPED = 0.1
"""The share of pictures that are trained without their class, for guidance."""


def rate_at(share: float, step: int) -> float:
    """Learning rate as a share of its peak: a rise of 1,000 steps of the optimiser, flat, from 50 %
    of the time on a cosine to 1 %."""
    fall = max(0.0, min(1.0, (share - 0.5) / 0.5))
    return min(1.0, (step + 1) / 1000) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fall)))


class Noising:
    """What a kind of model is shown, and what it is to say."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.flow = kind == "transformer"
        kept = scheduler("ddim").alphas_cumprod.to(device)
        self.signal, self.noise = kept.sqrt(), (1 - kept).sqrt()

    def __call__(self, clean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy pixels, their times, and the target."""
        batch, device = len(clean), clean.device
        # One time from each of `batch` equal slices: the loss varies less from step to step.
        spread = torch.randperm(batch, device=device) + torch.rand(batch, device=device)
        spread = spread / batch
        if not self.flow:
            t = (spread * len(self.signal)).long().clamp(max=len(self.signal) - 1)
            a, b = self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)
            return a * clean + b * noise, t, noise
        # Logit-normal times (Esser et al., arXiv 2403.03206): more of those in the middle.
        s = torch.special.ndtri(spread.clamp(1e-4, 1 - 1e-4)).sigmoid()
        at = s.view(-1, 1, 1, 1)
        return (1 - at) * clean + at * noise, s * 1000, noise - clean


class Training:
    """A model, its average and its optimiser, as far as they have come."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.model = make(args.kind).to(device)
        # Not in training mode: nothing is dropped but labels, which are dropped for all blocks.
        self.model.eval()
        if args.kind == "unet":
            self.model.to(memory_format=torch.channels_last)
        self.average = {n: w.detach().clone() for n, w in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=args.lr,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=device.type == "cuda",
        )
        self.step = 0
        self.fresh = 0  # the step at which the optimiser began
        self.seconds = 0.0  # of runs before this one
        self.log: list[dict[str, float]] = []
        self.begun = time.monotonic()
        state = args.out / "state.pt"
        if state.exists():
            self._go_on(torch.load(state, map_location=device, weights_only=True))
        elif args.start is not None:
            self._start_from(args.start)

    def _go_on(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, w in state["average"].items():
            self.average[name].copy_(w)
        self.fresh = state["fresh"]
        self._count_from(state["step"], state["seconds"], state["log"])

    def _start_from(self, folder: Path) -> None:
        self.model.load_state_dict(weights.load(folder / "model.safetensors"))
        for name, w in self.model.state_dict().items():
            self.average[name].copy_(w)
        before = json.loads((folder / "training.json").read_text())
        self.fresh = before["steps"]
        self._count_from(before["steps"], before["seconds"], before["log"])

    def _count_from(self, step: int, seconds: float, log: list[dict[str, float]]) -> None:
        self.step, self.seconds, self.log = step, seconds, log
        torch.manual_seed(self.args.seed + step)
        print(f"goes on at step {step}, after {seconds:.0f} s", flush=True)

    @property
    def spent(self) -> float:
        return self.seconds + time.monotonic() - self.begun

    def save(self) -> None:
        out = self.args.out
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "fresh": self.fresh,
            "seconds": self.spent,
            "log": self.log,
        }
        torch.save(state, out / "state.part")
        (out / "state.part").rename(out / "state.pt")
        weights.save(self.average, out / "model.safetensors")
        on = self.device
        summary = {
            "kind": self.args.kind,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "batch": self.args.batch,
            "pictures": self.step * self.args.batch,
            "seconds": round(self.spent, 1),
            "learning_rate": self.args.lr,
            "hardware": torch.cuda.get_device_name(on) if on.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "log": self.log,
        }
        (out / "training.json").write_text(json.dumps(summary) + "\n")


def train(t: Training) -> None:
    """Until the clock says stop."""
    args, device = t.args, t.device
    data = read(args.data, "train").to(device)
    nothing = torch.full((args.batch,), NOTHING, device=device)
    noising = Noising(args.kind, device)
    predict = torch.compile(t.model, dynamic=False) if device.type == "cuda" else t.model
    current, average = list(t.model.state_dict().values()), list(t.average.values())
    window: list[Tensor] = []
    last_save = time.monotonic()

    def note() -> None:
        loss = torch.stack(window).mean().item()
        window.clear()
        if not math.isfinite(loss):
            raise SystemExit(f"the loss became {loss} at step {t.step}")
        t.log.append({"step": t.step, "seconds": round(t.spent, 1), "loss": round(loss, 5)})
        print(f"step {t.step}  {t.spent:.0f} s  loss {loss:.4f}", flush=True)

    while t.spent < args.minutes * 60 and t.step != args.steps:
        if args.now is not None and time.monotonic() - t.begun > args.now * 60:
            break
        share = t.spent / (args.minutes * 60)
        t.optimizer.param_groups[0]["lr"] = args.lr * rate_at(share, t.step - t.fresh)
        chosen = torch.randint(len(data.labels), (args.batch,), device=device)
        clean = data.pixels[chosen].float() / 127.5 - 1
        mirrored = torch.rand(args.batch, 1, 1, 1, device=device) < 0.5
        clean = torch.where(mirrored, clean.flip(3), clean)
        dropped = torch.rand(args.batch, device=device) < DROPPED
        labels = torch.where(dropped, nothing, data.labels[chosen])
        noisy, time_, target = noising(clean, torch.randn_like(clean))
        if args.kind == "unet":
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = predict(noisy, time_, labels)
        loss = mse_loss(predicted.float(), target)
        loss.backward()
        nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
        t.optimizer.step()
        t.optimizer.zero_grad(set_to_none=True)
        t.step += 1
        decay = min(args.ema, t.step / (t.step + 9))
        torch._foreach_lerp_(average, current, 1 - decay)
        window.append(loss.detach())
        if len(window) == 250:
            note()
        if time.monotonic() - last_save > args.save_every:
            t.save()
            last_save = time.monotonic()
    if window:
        note()
    t.save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10's pictures")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of an earlier machine's results")
    parser.add_argument("--minutes", type=float, default=24.0, help="of all runs together")
    parser.add_argument("--now", type=float, help="minutes of this run")
    parser.add_argument("--steps", type=int, help="end after so many steps in all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=120, help="seconds")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args, torch.device(args.device))
    train(training)
    model = make(args.kind)
    model.load_state_dict(weights.load(args.out / "model.safetensors"))
    draw(pipeline(args.kind, model).to(args.device), args.out / "sheet.png", each=2)
    print(f"{len(CLASSES)} classes drawn; {training.spent:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
