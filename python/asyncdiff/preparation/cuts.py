"""What nodes cost on a device, and where a denoiser was cut by that, kept for other processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..graph.capture import Captured, tensors_of
from ..partition.cost import Costs
from ..partition.links import Links
from ..partition.partition import Partition, partition
from ..phases import phase
from ..turns import alone
from .folder import preparations
from .identity import digest
from .key import of_cuts

_KIND = "cuts"


class KeptCuts:
    """The cuts of ``captured`` in ``components`` parts for ranks on ``units`` of hardware, of which
    the last ``copies`` run the last part; ``devices`` are those of this process. ``settings``: what
    else costs and cuts depend on. Cuts that were made for other ``links`` are not taken."""

    def __init__(
        self,
        captured: Captured,
        components: int,
        copies: int,
        devices: Sequence[torch.device],
        units: Sequence[str],
        settings: Sequence[Any],
        links: Links,
    ) -> None:
        self._captured, self._components, self._links = captured, components, links
        self._folder = preparations()
        self._usable = self._folder.usable()
        self._key = ""
        if self._usable:
            with phase("load"):
                told = [components, copies, *settings]
                self._key = of_cuts(of_nodes(captured), devices, units, told)

    def costs(self) -> Costs | None:
        """What nodes cost, if that is known, whatever links cuts were made for."""
        data = self._folder.read(_KIND, self._key) if self._usable else None
        try:
            return None if data is None else self._costs(data)
        except Exception:  # of which who looks for a cut is told
            return None

    def get(self, make: Callable[[], Partition]) -> Partition:
        """The cut that is known, else that which ``make`` returns, which is kept. Raises what
        ``make`` does."""
        if not self._usable:
            return make()
        found = self._found()
        if found is not None:
            return found
        with alone(self._folder.turn(_KIND, self._key)):
            found = self._found()
            if found is None:
                found = make()
                self.keep(found)
        return found

    def keep(self, parts: Partition) -> None:
        """Keep a cut, in the place of the one that is known."""
        if not self._usable or parts.costs is None or parts.cuts is None:
            return
        nodes, costs = self._captured.nodes, parts.costs
        tables = {id(ms): ms for ms in costs.each}
        data = {
            "cuts": list(parts.cuts),
            "settled": parts.settled,
            "links": self._links.to_list(),
            "source": costs.source,
            "ms": [costs.ms[n] for n in nodes],
            "macs": [costs.macs[n] for n in nodes],
            "tables": [[ms[n] for n in nodes] for ms in tables.values()],
            "each": [list(tables).index(id(ms)) for ms in costs.each],
            "busy": costs.busy,
        }
        what = f"{len(nodes)} nodes in {self._components} components, {costs.source}"
        self._folder.write(_KIND, self._key, what, data)

    @phase("load")
    def _found(self) -> Partition | None:
        data = self._folder.read(_KIND, self._key)
        if data is None:
            return None
        try:
            return self._made(data)
        except Exception as e:  # whatever is in a file that is not what it says
            where = self._folder.file(_KIND, self._key)
            self._folder.say(f"a preparation on the disk is ignored, {where}: {e!r}")
            return None

    def _costs(self, data: dict[str, Any]) -> Costs:
        nodes = self._captured.nodes
        ms = dict(zip(nodes, map(float, data["ms"]), strict=True))
        macs = dict(zip(nodes, map(int, data["macs"]), strict=True))
        tables = [dict(zip(nodes, map(float, t), strict=True)) for t in data["tables"]]
        each = tuple(tables[int(i)] for i in data["each"])
        return Costs(
            ms, macs, f"{data['source']}".removesuffix(_AGAIN) + _AGAIN, each, bool(data["busy"])
        )

    def _made(self, data: dict[str, Any]) -> Partition | None:
        if not self._links.like(data["links"]):
            return None
        costs = self._costs(data)
        cuts = [str(name) for name in data["cuts"]]
        made = partition(self._captured, self._components, cuts, costs=costs)
        return replace(made, settled=bool(data["settled"]))


#: In what is said of where costs are from.
_AGAIN = ", in an earlier process"


def of_nodes(captured: Captured) -> str:
    """A word for a graph: its nodes, and the shapes, strides and dtypes of their values."""

    def word() -> str:
        return digest(
            [
                (n.name, n.op, str(n.target), str(n.args), str(n.kwargs), _shapes(n))
                for n in captured.graph.nodes
            ]
        )

    return captured.once_known("a word for its nodes", word)


def _shapes(node: torch.fx.Node) -> list[Any]:
    return [(tuple(t.shape), t.stride(), str(t.dtype)) for t in tensors_of(node)]
