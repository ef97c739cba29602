"""What of a model fits on which cards: components of its denoiser, and what else a pipeline has.

Nothing is computed: the denoiser is on the meta device, and all is counted by shapes, as limits of
the cut count it (:mod:`asyncdiff.partition.memory`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..graph.capture import Captured
from ..partition.balance import least
from ..partition.cost import Costs, estimate
from ..partition.memory import Limits, Needs, Use, in_words, weight_bytes
from ..partition.ownership import units
from ..partition.partition import partition
from ..partition.speeds import at_speeds, runners

#: The share of a card that can be used, after what a context takes.
_USABLE, _CONTEXT = 0.92, 500_000_000
#: Ways to store weights, and the bytes of one in a linear layer; None: as it is.
STORED: dict[str, int | None] = {"plain": None, "int8": 1, "float8": 1}
#: Where the other models are while it denoises: all on one card; there in turn, each for as long as
#: it works (pipe.enable_model_cpu_offload()); on none.
PLACES = ("on a card", "offloaded", "elsewhere")


@dataclass(frozen=True)
class Way:
    """A way to have the model on the cards, or what it lacks. ``weights``: how the denoiser's are
    stored; ``others``: where the other models are, one of :data:`PLACES`, with ``home`` the card
    that has them; ``needs``: bytes of each card that are needed, with them."""

    weights: str
    others: str
    home: int | None
    fits: bool
    needs: list[int]
    components: list[Use] = field(default_factory=list)
    cuts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values = vars(self) | {"components": [use.to_dict() for use in self.components]}
        return values | {"cuts": list(self.cuts)}


def usable(card: int) -> int:
    """Bytes of a card of so many that models may take: without a context, what libraries take, and
    what an allocator cannot use."""
    return max(int(_USABLE * card - _CONTEXT), 0)


def stored(captured: Captured, kind: str) -> tuple[Mapping[str, int], int]:
    """Bytes of each weight where those of linear layers are stored in this way, with a scale of
    four bytes a row; and those of the largest when it is decoded."""
    sizes, each = dict(weight_bytes(captured)), STORED[kind]
    if each is None:
        return sizes, 0
    largest = 0
    for name, weight in captured.weights.items():
        if weight.dim() == 2 and captured.names[name].endswith("weight"):
            largest = max(largest, sizes[name])
            sizes[name] = weight.numel() * each + 4 * weight.shape[0]
    return sizes, largest


def fitting(
    captured: Captured,
    others: Mapping[str, int],
    cards: Sequence[int],
    slots: int = 2,
    speeds: Sequence[float] | None = None,
    denoisers: int = 1,
) -> list[Way]:
    """For each way to store weights the first place for the other models with which the denoiser
    fits, a component a card in their order; the closest one where none does.

    ``others``: bytes of the other models by name; ``cards``: bytes of each card; ``speeds``: how
    fast they are; ``denoisers``: how many of them the pipeline has, which are alike.
    """
    costs = estimate(captured)
    count = len(cards)
    if speeds is not None:
        costs = at_speeds(costs, speeds, runners(count, 1, count))
    return [_way(captured, costs, kind, others, cards, slots, denoisers) for kind in STORED]


def _way(
    captured: Captured,
    costs: Costs,
    kind: str,
    others: Mapping[str, int],
    cards: Sequence[int],
    slots: int,
    denoisers: int,
) -> Way:
    sizes, decoded = stored(captured, kind)
    sizes = {name: denoisers * nbytes for name, nbytes in sizes.items()}
    limits = Limits((None,) * len(cards), slots, of_weights=sizes)
    owned = units(captured)
    need = Needs(captured, owned, limits).matrix(limits) + decoded
    closest: Way | None = None
    for place, home, beside in _places(others, len(cards)):
        room = [usable(c) - (beside if i == home else 0) for i, c in enumerate(cards)]
        starts = least(need, [max(r, 1) for r in room])
        edges = [0, *starts, len(owned)]
        wanted = [need[a, b] for a, b in itertools.pairwise(edges)]
        needs = [int(w) + (beside if i == home else 0) for i, w in enumerate(wanted)]
        if all(w <= r for w, r in zip(wanted, room, strict=True)):
            within = replace(limits, each=tuple(r - decoded for r in room))
            parts = partition(captured, len(cards), costs=costs, limits=within)
            uses = [replace(u, activations=u.activations + decoded) for u in parts.memory()]
            needs = [u.total + (beside if i == home else 0) for i, u in enumerate(uses)]
            return Way(kind, place, home, True, needs, uses, parts.cuts or ())
        way = Way(kind, place, home, False, needs)
        if closest is None or _lack(way, cards) < _lack(closest, cards):
            closest = way
    assert closest is not None
    return closest


def _places(others: Mapping[str, int], cards: int) -> Iterator[tuple[str, int | None, int]]:
    """Where the other models may be: how, on which card, and the bytes that they take there."""
    if others:
        for place, beside in zip(
            PLACES, (sum(others.values()), max(others.values())), strict=False
        ):
            yield from ((place, home, beside) for home in range(cards))
    yield PLACES[2], None, 0


def _lack(way: Way, cards: Sequence[int]) -> float:
    return float(np.max(np.array(way.needs) / np.maximum([usable(c) for c in cards], 1)))


def tell(found: Mapping[str, Any]) -> str:
    """What :func:`fitting` found, for people: ``found`` is what the command's JSON has."""
    cards = ", ".join(
        f"{i}: {in_words(c['bytes'])} ({in_words(c['usable_bytes'])} usable)"
        for i, c in enumerate(found["cards"])
    )
    lines = [
        f"cards      {cards}",
        f"denoiser   {found['denoiser']}, {in_words(found['denoiser_bytes'])} of weights in "
        f"{found['dtype']}",
    ]
    for name, nbytes in found["others"].items():
        lines.append(f"besides    {name}: {in_words(nbytes)}")
    for way in found["ways"]:
        lines += _told(way, bool(found["others"]))
    return "\n".join(lines)


def _told(way: Mapping[str, Any], others: bool) -> list[str]:
    stored_as = "as they are" if way["weights"] == "plain" else f"in {way['weights']}"
    head = f"{way['weights']:<10} weights {stored_as}: "
    each = ", ".join(f"card {i} {in_words(n)}" for i, n in enumerate(way["needs"]))
    place = {
        "on a card": f", all other models on card {way['home']}",
        "offloaded": f", the other models offloaded, in turn on card {way['home']}",
        "elsewhere": ", the other models on none of them" if others else "",
    }[way["others"]]
    if not way["fits"]:
        return [f"{head}does not fit; the closest would need {each}{place}"]
    lines = [f"{head}fits, {each}{place}"]
    for i, use in enumerate(way["components"]):
        words = Use(**{k: v for k, v in use.items() if k != "total"})
        lines.append(f"           component {i} on card {i}: {words}")
    return lines
