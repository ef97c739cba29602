"""Ways of running a denoiser: eager, in one CUDA graph, asynchronously over several ranks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
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
        denoiser.warmup, denoiser.exact_tail = setting.warmup, setting.tail
        denoiser.warmup_mode = "split" if setting.split_warmup else "chain"
        if setting.generate:
            return loop.on_ranks(denoiser)
        with denoiser.generation(loop.timesteps, loop.scheduler):
            return loop(lambda kwargs: denoiser(**kwargs)[0])


def component_times(denoiser: Any, replays: int = 20) -> tuple[list[float], list[float]]:
    """Milliseconds of each rank's component in a CUDA graph, without any exchange: alone, with
    pauses (medians); and all at once and back to back, as warm as in a loop (means)."""
    workers = denoiser._engine.workers
    graphs = [_component(denoiser, worker) for worker in workers]
    alone = []
    for worker, graph in zip(workers, graphs, strict=True):
        times = []
        for _ in range(replays):
            times.append(_replayed([worker], [graph], 1)[0])
        alone.append(sorted(times)[len(times) // 2])
    return alone, _replayed(workers, graphs, replays)


def _component(denoiser: Any, worker: Any) -> torch.cuda.CUDAGraph:
    reads = {source: values for (source, slot), values in worker.mailbox.items() if slot == 0}
    ordered = {b.source: reads[b.source] for b in worker_reads(denoiser, worker)}
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), worker.current():
        worker.program.emit.hook = None
        with torch.cuda.graph(graph, stream=worker.stream):
            worker.program(*worker._arguments(ordered))
    return graph


def _replayed(workers: Sequence[Any], graphs: Sequence[Any], replays: int) -> list[float]:
    """Milliseconds of a replay, by worker, all of them at once."""
    marks = []
    for worker in workers:
        with worker.current():
            marks.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            marks[-1][0].record(worker.stream)
    for _ in range(replays):
        for worker, graph in zip(workers, graphs, strict=True):
            with worker.current():
                graph.replay()
    for worker, (_, ended) in zip(workers, marks, strict=True):
        with worker.current():
            ended.record(worker.stream)
    for worker in workers:
        worker.stream.synchronize()
    return [begun.elapsed_time(ended) / replays for begun, ended in marks]


def worker_reads(denoiser: Any, worker: Any) -> Any:
    """The bundles that a worker reads, in its program's order."""
    return denoiser.partition.components[worker.index].reads
