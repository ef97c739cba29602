"""How good the pictures of a yardstick model are, and whether it has learnt its pictures by heart.

    python benchmarks/yardsticks/judge.py unet --data FOLDER --device cuda   # writes unet.json
    python benchmarks/yardsticks/judge.py unet --data FOLDER --samples 40    # a try, on the CPU

- *Fréchet distance* between the features of samples and of CIFAR-10's test pictures (Heusel et al.,
  arXiv 1706.08500), and of the training pictures beside it: what a perfect model would have. The
  weights of the Inception network are not to be had here, so the features are those of a small
  residual network that is trained on CIFAR-10's classes first (its accuracy is reported). So the
  figures are no FID, and may only be compared with each other.
- *Class accuracy*: how often that network sees the class that was asked for.
- *Nearest training picture*: the distance (root mean square over pixels in 0 … 1) from each sample
  to the closest training picture or its mirror image, beside the same for test pictures, which
  nobody has learnt. By heart would be: much closer than test pictures are.
- *Variety*: the distance between samples of one class and different seeds, beside that between
  training pictures of one class.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file
from yardsticks.load import HERE, load
from yardsticks.models import KINDS
from yardsticks.pictures import CLASSES, Pictures, read


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(x + self.norms[1](self.second(y)))


class Classifier(nn.Module):
    """A residual network for 32 x 32 pixels. ``features``: (batch, 256), float32."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 64, 128, 256)
        stages = []
        for before, width in itertools.pairwise(widths):
            stages += [
                nn.Conv2d(before, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(2),
                Block(width),
            ]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(256, len(CLASSES))

    def features(self, pixels: Tensor) -> Tensor:
        return self.stages(pixels * 2 - 1).mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))


def classifier(data: Pictures, epochs: float, device: torch.device) -> Classifier:
    """A network trained on ``data``, always the same way."""
    torch.manual_seed(1)
    model = Classifier().to(device, memory_format=torch.channels_last)
    batch = 512
    steps = max(1, int(epochs * len(data.labels) / batch))
    optimizer = torch.optim.SGD(model.parameters(), 0.2, 0.9, weight_decay=5e-4, nesterov=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps + 1)
    for _ in range(steps):
        chosen = torch.randint(len(data.labels), (batch,), device=device)
        pixels = _augmented(data.pixels[chosen].float() / 255)
        with torch.autocast(device.type, torch.bfloat16):
            guess = model(pixels)
        F.cross_entropy(guess.float(), data.labels[chosen], label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rate.step()
    return model.eval().requires_grad_(False)


def _augmented(pixels: Tensor) -> Tensor:
    """Half of them mirrored, all of them moved by up to four pixels."""
    mirrored = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < 0.5
    pixels = torch.where(mirrored, pixels.flip(3), pixels)
    dy, dx = torch.randint(0, 9, (2,)).tolist()
    return F.pad(pixels, (4, 4, 4, 4))[:, :, dy : dy + 32, dx : dx + 32]


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians with the moments of these features (n, width)."""
    a, b = a.double(), b.double()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    # The trace of the root of a product: of its eigenvalues, which are those of a symmetric matrix.
    values, vectors = torch.linalg.eigh(ca)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ cb @ root).clamp(min=0).sqrt().sum()
    return float(apart + ca.trace() + cb.trace() - 2 * crossed)


def nearest(pixels: Tensor, data: Tensor) -> Tensor:
    """From each picture to the closest of ``data`` or its mirror image: root mean square."""
    best = torch.full((len(pixels),), float("inf"), device=pixels.device)
    flat = pixels.flatten(1)
    for part in data.split(5000):
        part = part.float() / 255
        for other in (part, part.flip(3)):
            best = torch.minimum(best, torch.cdist(flat, other.flatten(1)).amin(1))
    return best / flat.shape[1] ** 0.5


def variety(pixels: Tensor, labels: Tensor) -> float:
    """Mean distance (root mean square) between pictures of one class."""
    means = []
    for label in labels.unique():
        flat = pixels[labels == label][:200].flatten(1)
        if len(flat) > 1:
            means.append(torch.pdist(flat).mean() / flat.shape[1] ** 0.5)
    return float(torch.stack(means).mean())


def drawn(pipe: Any, count: int, batch: int, **call: Any) -> Pictures:
    """``count`` samples, classes in turn, seed i for the i-th."""
    pixels, labels = [], torch.arange(count) % len(CLASSES)
    for part in torch.arange(count).split(batch):
        noise = [torch.Generator().manual_seed(int(i)) for i in part]
        names = [CLASSES[int(labels[i])] for i in part]
        pixels.append(pipe(names, generator=noise, output_type="pt", **call).images.float())
    return Pictures(torch.cat(pixels), labels.to(pixels[0].device))


def quantiles(x: Tensor) -> dict[str, float]:
    """Median, lowest per cent and minimum."""
    return {
        "median": round(float(x.median()), 4),
        "p1": round(float(x.quantile(0.01)), 4),
        "min": round(float(x.min()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--epochs", type=float, default=20, help="of the classifier")
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--weights", type=Path, help="a model.safetensors that is not shipped yet")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, begun = torch.device(args.device), time.monotonic()
    train, test = (read(args.data, part).to(device) for part in ("train", "test"))
    if args.epochs < 1:  # a try
        test = Pictures(test.pixels[::100], test.labels[::100])
    network = classifier(train, args.epochs, device)

    def seen(pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and the classes that the network sees."""
        parts = [network.features(x) for x in pixels.split(1000)]
        features = torch.cat(parts)
        return features, network.head(features).argmax(1)

    ours = test.pixels.float() / 255
    target, guesses = seen(ours)
    some = train.pixels[torch.randperm(len(train.labels), device=device)[: args.samples]]
    figures: dict[str, Any] = {
        "samples": args.samples,
        "classifier_accuracy": round(float((guesses == test.labels).float().mean()), 4),
        "frechet_of_training_pictures": round(frechet(seen(some.float() / 255)[0], target), 4),
        "nearest_of_test_pictures": quantiles(nearest(ours[:1000], train.pixels)),
        "variety_of_training_pictures": round(
            variety(train.pixels[::10].float() / 255, train.labels[::10]), 4
        ),
        "guidance": {},
    }
    pipe = load(args.kind, args.device, weights=args.weights)
    for scale in args.guidance:
        samples = drawn(
            pipe, args.samples, args.batch, guidance_scale=scale, num_inference_steps=args.steps
        )
        features, guesses = seen(samples.pixels)
        figures["guidance"][f"{scale:g}"] = {
            "frechet": round(frechet(features, target), 4),
            "class_accuracy": round(float((guesses == samples.labels).float().mean()), 4),
            "nearest": quantiles(nearest(samples.pixels[:1000], train.pixels)),
            "variety": round(variety(samples.pixels, samples.labels), 4),
        }
        print(scale, figures["guidance"][f"{scale:g}"], flush=True)
    figures["seconds"] = round(time.monotonic() - begun, 1)
    out = args.out or HERE / f"{args.kind}.json"
    results_file.write(out, figures)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
