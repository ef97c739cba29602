"""The models that the fidelity benchmark draws with, and what they are asked to draw."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asyncdiff.cli.subject import chosen
from asyncdiff.demo import model as demo_model
from yardsticks import load as yardsticks
from yardsticks.pictures import CLASSES


@dataclass(frozen=True)
class Subject:
    """A model. ``steps``: the samplers that it is drawn with, and the steps that each is usually
    given; ``guidance``: its usual scale."""

    name: str
    steps: dict[str, int]
    guidance: float

    def load(self, device: str, sampler: str) -> Any:
        """The pipeline on its device, silent."""
        raise NotImplementedError

    def prompts(self, count: int) -> list[str]:
        """What is drawn."""
        raise NotImplementedError

    def other_prompts(self, count: int, drawn: Sequence[str]) -> list[str]:
        """What is calibrated on: others than those ``drawn``, or others by their noise."""
        raise NotImplementedError


class Emoji(Subject):
    """The shipped model."""

    def load(self, device: str, sampler: str) -> Any:
        pipe = demo_model.load(device, scheduler=sampler)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def prompts(self, count: int) -> list[str]:
        return chosen(demo_model.known_prompts(), count)

    def other_prompts(self, count: int, drawn: Sequence[str]) -> list[str]:
        return chosen([p for p in demo_model.known_prompts() if p not in set(drawn)], count)


@dataclass(frozen=True)
class Yardstick(Subject):
    """One of the models in benchmarks/yardsticks. Pictures of a class differ by their noise."""

    weights: Path | None = None

    def load(self, device: str, sampler: str) -> Any:
        return yardsticks.load(self.name, device, sampler, self.weights)

    def prompts(self, count: int) -> list[str]:
        return [CLASSES[i % len(CLASSES)] for i in range(count)]

    def other_prompts(self, count: int, drawn: Sequence[str]) -> list[str]:
        return self.prompts(count)


@dataclass(frozen=True)
class Folder(Subject):
    """A diffusers pipeline on the disk, and a list of prompts."""

    dtype: torch.dtype = torch.float16
    texts: tuple[str, ...] = ()

    def load(self, device: str, sampler: str) -> Any:
        import diffusers

        pipe = diffusers.DiffusionPipeline.from_pretrained(
            self.name, dtype=self.dtype, local_files_only=True
        ).to(device)
        classes = {
            "ddim": "DDIMScheduler",
            "dpm": "DPMSolverMultistepScheduler",
            "euler": "EulerDiscreteScheduler",
            "flow": "FlowMatchEulerDiscreteScheduler",
        }
        pipe.scheduler = getattr(diffusers, classes[sampler]).from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def prompts(self, count: int) -> list[str]:
        return chosen(list(self.texts), count)

    def other_prompts(self, count: int, drawn: Sequence[str]) -> list[str]:
        return chosen([t for t in self.texts if t not in set(drawn)], count)


MODELS = ("emoji", "unet", "transformer")
"""The shipped model, and the yardsticks."""
_NOISE = {"ddim": 50, "dpm": 25, "euler": 30}


def subject(args: argparse.Namespace) -> Subject:
    """What the arguments of the benchmark ask for."""
    if args.pipeline is not None:
        texts: Sequence[str] = demo_model.known_prompts()
        if args.prompts_file is not None:
            texts = [line for line in args.prompts_file.read_text().splitlines() if line.strip()]
        steps = {**_NOISE, "flow": 28}
        return Folder(args.pipeline, steps, 5.0, getattr(torch, args.dtype), tuple(texts))
    if args.model == "emoji":
        return Emoji("emoji", _NOISE, 5.0)
    steps = _NOISE if args.model == "unet" else {"flow": 28}
    return Yardstick(args.model, steps, 2.0, args.weights)
