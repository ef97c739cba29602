"""Ways of running a denoiser: eager, in one CUDA graph, asynchronously over several ranks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import asyncdiff
from denoise.loop import Denoise, Loop
from denoise.settings import Setting


class Eager:
    """(a) The module as it is, on one GPU."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def run(self, loop: Loop) -> torch.Tensor:
        return loop(lambda kwargs, _: self.module(**kwargs)[0])


class Graphed:
    """(b) The whole denoiser in one CUDA graph: what a careful user has on one GPU.

    ``compile``: (c) compiled by torch.compile before that, with channels last: what the best has.
    Each of a step's calls has a graph.
    """

    def __init__(self, module: nn.Module, compile: bool = False) -> None:
        if compile:
            # Not in place: other CUDA graphs read the module's weights where they lie.
            module = copy.deepcopy(module)
            for weight in module.parameters():
                if weight.dim() == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            module = torch.compile(module, fullgraph=True, dynamic=False)
        self._module = module  # its weights and kernels are what the graphs use
        self._calls: dict[int, _GraphedCall] = {}

    def run(self, loop: Loop) -> torch.Tensor:
        def denoise(kwargs: dict[str, Any], call: int) -> torch.Tensor:
            if call not in self._calls:
                self._calls[call] = _GraphedCall(self._module, kwargs, loop.name)
            return self._calls[call](kwargs)

        return loop(denoise)


class _GraphedCall:
    """A call of a module in a CUDA graph, with the conditioning that it was made with. ``name``: of
    the latents."""

    def __init__(self, module: nn.Module, inputs: dict[str, Any], name: str) -> None:
        leaves, spec = pytree.tree_flatten(inputs)
        self._moving = inputs[name].shape
        self._static = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        kwargs = pytree.tree_unflatten(self._static, spec)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(2):
                module(**kwargs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Without a stream torch takes one of whichever device was current at its first capture.
        with torch.no_grad(), torch.cuda.graph(self._graph, stream=stream):
            self._out = module(**kwargs)[0]

    def __call__(self, kwargs: dict[str, Any]) -> torch.Tensor:
        for static, new in zip(self._static, pytree.tree_leaves(kwargs), strict=True):
            # The conditioning is the same object in every step: only new tensors are copied.
            if isinstance(new, torch.Tensor) and (new.dim() < 2 or new.shape == self._moving):
                static.copy_(new)
        self._graph.replay()
        return self._out


@contextlib.contextmanager
def denoising(
    denoiser: asyncdiff.AsyncDenoiser, loop: Loop, steps: int | None = None
) -> Iterator[Denoise]:
    """A generation of the loop's steps, or of the last ones."""
    times = loop.timesteps if steps is None else loop.timesteps[-steps:]
    with denoiser.generation(times, loop.scheduler, branches=len(loop.calls)):
        yield lambda kwargs, _: denoiser(**kwargs)[0]


class Team:
    """Ranks that serve several settings, one after another. ``settings``: others of an
    AsyncDenoiser."""

    def __init__(
        self,
        module: nn.Module,
        loop: Loop,
        setting: Setting,
        devices: list[str],
        compile: bool | str,
        progress: Any = None,
        **settings: Any,
    ) -> None:
        several = len(loop.calls) > 1
        self.denoiser = asyncdiff.AsyncDenoiser(
            module,
            (),
            None if several else loop.inputs,
            devices=devices,
            components=setting.components,
            stride=setting.stride,
            schedule=setting.schedule,
            delay=setting.delay,
            guidance="split" if setting.split else "batched",
            compile=compile,
            progress=progress,
            **settings,
        )
        if several:  # a step of them tells ranks what they are for
            with denoising(self.denoiser, loop, 1) as denoise, torch.no_grad():
                for n, call in enumerate(loop.calls):
                    denoise(call, n)


class Asynchronous:
    """(d) asyncdiff, on the ranks of a team."""

    def __init__(self, team: Team, setting: Setting) -> None:
        self.denoiser = team.denoiser
        self.setting = setting

    def run(self, loop: Loop) -> torch.Tensor:
        denoiser, setting = self.denoiser, self.setting
        denoiser.configure(
            warmup=setting.warmup,
            exact_tail=setting.tail,
            exact_mode=setting.exact_mode,
        )
        with denoising(denoiser, loop) as denoise:
            return loop(denoise)


def component_times(denoiser: Any, replays: int = 20) -> list[float]:
    """Milliseconds of each rank's component in a CUDA graph, alone and without any exchange
    (medians)."""
    engine = denoiser._engine
    teams = getattr(engine, "engines", [engine])  # with guidance split one for each condition
    out = []
    for team, worker in ((t, w) for t in teams for w in t.workers):
        graph = team.graph_alone(worker)
        times = []
        with worker.current():
            for _ in range(replays):
                begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begun.record(worker.stream)
                graph.replay()
                ended.record(worker.stream)
                worker.stream.synchronize()
                times.append(begun.elapsed_time(ended))
        out.append(sorted(times)[len(times) // 2])
    return out
