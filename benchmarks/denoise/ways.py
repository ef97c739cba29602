"""Ways of running a denoiser: eager, in one CUDA graph, asynchronously over several ranks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import asyncdiff
from denoise.loop import Loop
from denoise.settings import Setting


class Eager:
    """(a) The module as it is, on one GPU."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def run(self, loop: Loop) -> torch.Tensor:
        return loop(lambda kwargs: self.module(**kwargs)[0])


class Graphed:
    """(b) The whole denoiser in one CUDA graph: what a careful user has on one GPU.

    ``compile``: (c) compiled by torch.compile before that, with channels last: what the best has.
    """

    def __init__(self, module: nn.Module, inputs: dict[str, Any], compile: bool = False) -> None:
        if compile:
            # Not in place: other CUDA graphs read the module's weights where they lie.
            module = copy.deepcopy(module)
            for weight in module.parameters():
                if weight.dim() == 4:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            module = torch.compile(module, fullgraph=True, dynamic=False)
        self._module = module  # its weights and kernels are what the graph uses
        leaves, self._spec = pytree.tree_flatten(inputs)
        self._static = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
        kwargs = pytree.tree_unflatten(self._static, self._spec)
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

    def _denoise(self, kwargs: dict[str, Any]) -> torch.Tensor:
        for static, new in zip(self._static, pytree.tree_leaves(kwargs), strict=True):
            # The conditioning is the same object in every step: only new tensors are copied.
            if isinstance(new, torch.Tensor) and (new.dim() < 2 or new.shape == self._moving):
                static.copy_(new)
        self._graph.replay()
        return self._out

    def run(self, loop: Loop) -> torch.Tensor:
        self._moving = loop.inputs[loop.name].shape
        return loop(self._denoise)


class Team:
    """Ranks that serve several settings, one after another."""

    def __init__(
        self,
        module: nn.Module,
        inputs: dict[str, Any],
        setting: Setting,
        devices: list[str],
        compile: bool,
    ) -> None:
        self.denoiser = asyncdiff.AsyncDenoiser(
            module,
            (),
            inputs,
            devices=devices,
            components=setting.components,
            stride=setting.stride,
            schedule=setting.schedule,
            delay=setting.delay,
            guidance="split" if setting.split else "batched",
            compile=compile,
        )


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
            warmup_mode="split" if setting.split_warmup else "chain",
        )
        with denoiser.generation(loop.timesteps, loop.scheduler):
            return loop(lambda kwargs: denoiser(**kwargs)[0])


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
