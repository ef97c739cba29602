"""What a partition looks like: a table to read, a dict for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .memory import Use


@dataclass(frozen=True)
class ComponentReport:
    """One component: graph nodes, parameters, extent; milliseconds (on its device) and
    multiply-accumulates of one run, without what is computed ahead, once a generation or once a
    timestep."""

    nodes: int
    ms: float
    macs: int
    parameters: int
    first_module: str
    last_module: str


@dataclass(frozen=True)
class BoundaryReport:
    """One bundle: ``tail_bytes`` are computed last, so that no compute is left to hide them."""

    source: int
    target: int
    bytes: int
    tensors: int
    tail_bytes: int


@dataclass(frozen=True)
class PartitionReport:
    """All components and boundaries. ``source`` says where the milliseconds come from; ``cuts``,
    given as ``split``, make the same partition again (None for a split by module paths).
    ``whole_ms``: milliseconds of the whole denoiser on one device, where components repeat so much
    of each other's work that it is not their sum (None: it is). ``speeds``: how fast each
    component's device is, 1 the fastest; all 1 where devices are taken to be alike. ``memory``:
    what each component needs, estimated; of tokens that are shared out, for all tokens."""

    components: list[ComponentReport]
    boundaries: list[BoundaryReport]
    source: str
    cuts: tuple[str, ...] | None
    whole_ms: float | None = None
    speeds: list[float] = field(default_factory=list)
    memory: list[Use] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"memory": [use.to_dict() for use in self.memory]}

    def __str__(self) -> str:
        slowest = max(c.ms for c in self.components)
        rows = [f"times {self.source}; slowest component {slowest:.3f} ms"]
        head = f"{'component':>9} {'nodes':>6} {'ms':>9} {'GMACs':>9} {'M params':>9}  from … to"
        rows.append(head)
        for i, c in enumerate(self.components):
            rows.append(
                f"{i:>9} {c.nodes:>6} {c.ms:>9.3f} {c.macs / 1e9:>9.2f} "
                f"{c.parameters / 1e6:>9.2f}  {c.first_module} … {c.last_module}"
            )
        if len(set(self.speeds)) > 1:
            told = ", ".join(f"{i} at {100 * s:.0f} %" for i, s in enumerate(self.speeds))
            rows.append(f"speeds of the components' devices: {told}")
        rows += [f"memory of component {i}, estimated: {use}" for i, use in enumerate(self.memory)]
        for b in self.boundaries:
            rows.append(
                f"{b.source} -> {b.target}: {b.tensors} tensors, {b.bytes / 2**20:.2f} MiB "
                f"({b.tail_bytes / 2**20:.2f} MiB at the end)"
            )
        return "\n".join(rows)
