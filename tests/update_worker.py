"""Runs the Triton kernels of the update beside plain torch and real schedulers; prints errors.

A process of its own, because Triton decides between compiler and interpreter when it is imported:
``TRITON_INTERPRET=1 python tests/update_worker.py cpu``, or ``… cuda:0`` without the interpreter.
Prints one JSON object: for every case, its error relative to the largest element.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from typing import Any

import torch

from asyncdiff.clock import Clock
from asyncdiff.sampler import LinearSampler, linearize
from asyncdiff.update import Update

#: width, predictions at once, guided, rescaled, dtype of latents and of predictions, batch, size
CASES: dict[str, tuple[int, int, bool, bool, str, str, int, int]] = {
    "plain": (1, 1, False, False, "float32", "float32", 1, 8),
    "guided": (1, 1, True, False, "float32", "float32", 2, 8),
    "two steps": (2, 2, True, False, "float32", "float32", 2, 8),
    "three steps, odd size": (3, 3, True, False, "float32", "float32", 2, 7),
    "six steps, wide": (5, 6, True, False, "float32", "float32", 1, 5),
    "rescaled": (2, 2, True, True, "float32", "float32", 2, 21),
    "rescaled, six steps": (1, 6, True, True, "float32", "float32", 2, 7),
    "half": (2, 2, True, False, "float16", "float16", 1, 8),
    "half, rescaled": (1, 1, True, True, "float16", "float16", 2, 8),
    "bfloat16": (2, 1, True, False, "bfloat16", "bfloat16", 1, 8),
    "half predictions": (4, 2, True, False, "float32", "float16", 1, 8),
    "double": (2, 2, True, True, "float64", "float64", 1, 8),
}
#: scheduler, predictions at once
SCHEDULER_CASES: dict[str, tuple[str, int]] = {
    f"{name}, {served} at once": (f"{name}Scheduler", served)
    for name, served in itertools.product(
        ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"), (1, 2, 3)
    )
}


def random_sampler(width: int, steps: int, g: torch.Generator) -> LinearSampler:
    table = torch.randn(steps, width, width + 1, generator=g, dtype=torch.float64) * 0.5
    scales = torch.rand(steps, generator=g, dtype=torch.float64) + 0.5
    return LinearSampler("random", torch.arange(steps), scales, table, 0.0)


def against_torch(device: torch.device, case: Any) -> float:
    """Twelve steps by kernel and by plain torch, on the same predictions."""
    width, served, guided, rescaled, dtype, noise_dtype, batch, size = case
    g = torch.Generator().manual_seed(0)
    shape = (batch, 4, size, size + 1)
    copies = 2 if guided else 1
    steps = 12 // served * served
    sampler = random_sampler(width, steps, g)
    latents = torch.randn(shape, generator=g, dtype=torch.float64).to(getattr(torch, dtype))
    noises = torch.randn(steps, copies * batch, *shape[1:], generator=g, dtype=torch.float64)
    noises = noises.to(device, getattr(torch, noise_dtype))
    results = []
    for triton in (True, False):
        update = Update(
            shape,
            latents.dtype,
            device,
            steps,
            width,
            guided=guided,
            rescaled=rescaled,
            triton=triton,
        )
        ticks = steps // served
        # More than one program of the clock copies, the last one less than a whole block.
        table = torch.arange(900, 899 - ticks, -1, device=device)[:, None].repeat(1, 1300)
        time = torch.zeros_like(table[0])
        clock = Clock(time, table, device, update.step, triton=triton)
        update.load(sampler, latents.to(device), 7.5, 0.7)
        clock.load()
        into = torch.zeros(copies * batch, *shape[1:], dtype=noises.dtype, device=device)
        path = []
        for k in range(0, steps, served):
            update.advance(noises[k : k + served].unbind(), into)
            clock.advance(served)
            path += [update.latents.double(), into.double(), update.state.double()]
            assert bool((time == 900 - 1 - k // served).all()), "the clock is wrong"
        assert int(update.step) == steps
        results.append(path)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def against_scheduler(device: torch.device, name: str, served: int) -> float:
    """A whole generation by kernel and by the scheduler's own float32 loop, guided."""
    import diffusers

    scheduler = getattr(diffusers, name).from_config(
        {"beta_schedule": "scaled_linear", "beta_end": 0.012, "clip_sample": False}
    )
    scheduler.set_timesteps(12)
    sampler = linearize(scheduler)
    g = torch.Generator().manual_seed(1)
    shape = (1, 4, 8, 8)
    first = torch.randn(shape, generator=g) * scheduler.init_noise_sigma
    noises = torch.randn(12, 2, *shape[1:], generator=g)
    latents = first
    for t, noise in zip(scheduler.timesteps, noises, strict=True):
        scheduler.scale_model_input(latents, t)
        u, c = noise.chunk(2)
        latents = scheduler.step(u + 4.0 * (c - u), t, latents, return_dict=False)[0]
    update = Update(shape, torch.float32, device, 12, sampler.width, guided=True, triton=True)
    clock = Clock(None, None, device, update.step, triton=True)
    update.load(sampler, first, 4.0)
    into = torch.zeros(2, *shape[1:], device=device)
    for k in range(0, 12, served):
        update.advance(noises[k : k + served].to(device).unbind(), into)
        clock.advance(served)
    return float((update.latents.cpu() - latents).abs().max() / latents.abs().max())


def whole_generation() -> float:
    """generate() on three CPU ranks with the kernels in the interpreter, and by the scheduler."""
    import diffusers
    from toys import toy, toy_call

    from asyncdiff import AsyncDenoiser, clock, update, update_kernels

    one_at_a_time = threading.Lock()  # the interpreter is not made for threads

    class Kernels:
        moments_like = staticmethod(update_kernels.moments_like)
        ticks_of = staticmethod(update_kernels.ticks_of)

        @staticmethod
        def advance(*args: Any, **kwargs: Any) -> None:
            with one_at_a_time:
                update_kernels.advance(*args, **kwargs)

        @staticmethod
        def tick(*args: Any) -> None:
            with one_at_a_time:
                update_kernels.tick(*args)

    update.kernels = clock.kernels = lambda device, triton: Kernels  # type: ignore[assignment]
    split = [["down.1", "down.2", "mix"], ["enter", "down.0", "up", "leave"]]
    denoiser = AsyncDenoiser(toy().float(), devices=["cpu"] * 3, stride=2, split=split)
    call = toy_call()
    one, other = (
        denoiser.generate(
            call["sample"][:1].float(),
            {"encoder_hidden_states": call["encoder_hidden_states"].float()},
            diffusers.UniPCMultistepScheduler(),
            num_inference_steps=8,
            guidance_scale=4.0,
            guidance_rescale=0.5,
            update=way,
        )
        for way in ("linear", "scheduler")
    )
    denoiser.close()
    return float((one - other).abs().max() / other.abs().max())


def main() -> None:
    device = torch.device(sys.argv[1])
    errors = {name: against_torch(device, case) for name, case in CASES.items()}
    for name, (scheduler, served) in SCHEDULER_CASES.items():
        errors[name] = against_scheduler(device, scheduler, served)
    if device.type == "cpu":
        errors["a whole generation"] = whole_generation()
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
