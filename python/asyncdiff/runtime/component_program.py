"""What a rank computes: a component's program on its device, with all that this reads but the
bundles of other ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx

from ..graph.compiled.ahead import Compiling
from ..graph.compiled.compile import Pieces
from ..graph.hoist import hoist, store
from ..graph.program import on_device, weight_name
from ..graph.signature import Role
from ..graph.weights import Held, Weights
from ..graph.writes import Written
from ..partition.partition import Partition
from .cuda_graphs import GraphCache
from .rows import Rows


class ComponentProgram:
    """The program of a component on ``device``: its weights, its inputs and what is computed ahead,
    all where they stay, as CUDA graphs need it.

    ``tensors`` are the inputs of a call, whose shapes, dtypes and values the static inputs get.
    ``graphs`` are its rank's. Not thread-safe; what computes does so on the current stream.
    """

    def __init__(
        self,
        partition: Partition,
        index: int,
        device: torch.device,
        weights: Weights,
        tensors: Sequence[torch.Tensor],
        graphs: GraphCache,
    ) -> None:
        captured = self._captured = partition.captured
        places = captured.signature.places
        #: the inputs that it takes, by index
        self.inputs = [captured.inputs[n.name] for n in partition.components[index].inputs]
        with on_device(device):
            self.static = {i: torch.empty_like(tensors[i], device=device) for i in self.inputs}
            for i in self.inputs:
                self.static[i].copy_(tensors[i])
        #: those that change from step to step, by place among all of these
        self.moving = [(p, i) for p, i in enumerate(places[Role.LATENTS]) if i in self.static]
        self.times = places[Role.TIMESTEP]
        self.conditioning = self.static.keys() & places[Role.CONDITIONING]
        #: the weights that it computes with, which ranks of a device share, by placeholder
        self.held: dict[str, Held] = {}

        def bring(name: str, device: torch.device) -> torch.Tensor:
            self.held[name] = weights.get(captured, name, device)
            return self.held[name].tensor

        # A program holds where its values go: every rank has its own.
        parts = hoist(partition.program(index, device, bring))
        #: what the program was taken apart into, by whose weights it computes
        self._parts = [part for part in (parts.once, parts.timed, parts.main) if part is not None]
        #: what every run computes
        self.main = parts.main
        #: computes ``kept`` from the conditioning, when it has changed
        self.prelude = parts.once
        #: what ``main`` needs and is computed once a generation
        self.kept: list[torch.Tensor] = []
        #: inputs of the rows, besides the timestep
        self.row_conditioning = {captured.inputs[name] for name in parts.conditions}
        time = next((self.static[i] for i in self.times if i in self.static), None)
        timed = parts.timed
        #: what ``main`` needs of a timestep
        self.rows = Rows(timed, lambda: self._ahead(timed, self.kept), time, graphs)
        self.compiled = False

    def arguments(self, reads: Mapping[int, list[torch.Tensor]]) -> list[torch.Tensor]:
        """The arguments of ``main``, with bundles by source."""
        values = [*map(self.static.__getitem__, self.inputs)]
        for bundle in reads.values():
            values += bundle
        return values + self.kept + self.rows.values

    def refresh(self) -> None:
        """Compute again what depends on the conditioning alone."""
        assert self.prelude is not None
        self.kept = store(self.prelude(*self._ahead(self.prelude)), self.kept)

    def warm_up(self) -> None:
        """Compute for the first time what is computed ahead, which fixes where it lies."""
        if self.prelude is not None:
            self.refresh()
        self.rows.warm_up()

    def pieces(
        self,
        reads: Mapping[int, list[torch.Tensor]],
        compiling: Compiling,
        told: Callable[[int, int], None],
    ) -> Pieces:
        """``main`` in pieces, to be compiled for inputs, and bundles by source, like those that are
        there. Runs it once, without channels, where other processes compile."""
        pieces = Pieces(self.main, self.arguments(reads), compiling.regions(self._captured), told)
        if compiling.side_by_side:
            pieces.look()
        return pieces

    def compile(self, pieces: Pieces) -> list[str]:
        """Compile ``main``, which consists of these pieces; why inductor cannot compile those that
        are kept as they are. Runs it once, without channels."""
        made = pieces.compile()
        self._parts[-1] = self.main = made.program
        self.compiled = made.pieces > 0
        return made.refused

    def renew(self, weights: Weights, written: Written) -> bool | None:
        """Compute with the weights that the denoiser has now; whether any lies elsewhere then, None
        where it is not possible. See :meth:`~..graph.weights.Weights.renew`."""
        moved = weights.renew(self._captured, self.held, written)
        if moved is None:
            return None
        for name, held in moved.items():
            for part in self._parts:
                if hasattr(part, weight_name(name)):
                    setattr(part, weight_name(name), held.tensor)
            self.held[name] = held
        return bool(moved)

    def close(self) -> None:
        """Drop weights, rows and inputs, whose memory is free at once though others may still refer
        to this. It computes nothing any more."""
        self.rows.close()
        for part in self._parts:  # which refers to itself
            part._buffers.clear()
        self._parts.clear()
        del self.main
        self.prelude = None
        self.held.clear()
        self.static.clear()
        self.kept.clear()

    def _ahead(
        self, part: fx.GraphModule | None, kept: Sequence[torch.Tensor] = ()
    ) -> list[torch.Tensor | None]:
        """The arguments of a part of the program that needs no value of other components."""
        assert part is not None
        inputs = [self.static[i] for i in self.inputs]
        reads = len(part.graph.find_nodes(op="placeholder")) - len(inputs) - len(kept)
        return [*inputs, *[None] * reads, *kept]
