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

from ..errors import InputError, PartitionError
from ..graph.capture import Captured
from ..partition.balance import least
from ..partition.cost import Costs, estimate
from ..partition.memory import Limits, Needs, Use, in_words, weight_bytes
from ..partition.ownership import units
from ..partition.partition import partition
from ..partition.shards import shards
from ..partition.speeds import at_speeds, runners
from ..schedule.plan import EXACT, Exchange, rank_count, ring

#: The share of a card that can be used, after what a context takes.
_USABLE, _CONTEXT = 0.92, 500_000_000
#: Ways to store weights, and the bytes of one in a linear layer; None: as it is.
STORED: dict[str, int | None] = {"plain": None, "int8": 1, "float8": 1}
#: Where the other models are while it denoises: all on one card; there in turn, each for as long as
#: it works (pipe.enable_model_cpu_offload()); on none.
PLACES = ("on a card", "offloaded", "elsewhere")


@dataclass(frozen=True)
class Settings:
    """Settings that say what ranks hold, as in :class:`asyncdiff.ParallelConfig`. ``components``:
    None takes as many as there are cards for; ``split``: guidance is; ``compress``: something is,
    in asynchronous steps."""

    components: int | None = None
    stride: int = 1
    schedule: str = "asyncdiff"
    delay: int | None = None
    split: bool = False
    compress: bool = False

    @property
    def copies(self) -> int:
        """Ranks that run the last component."""
        return rank_count(1, self.stride, self.schedule)

    def components_on(self, cards: int) -> int:
        """How many components there are on so many cards, a rank each; 0 where these settings do
        not take so many cards."""
        group, rest = divmod(cards, 1 + self.split)
        count = group - self.copies + 1
        least = 1 if self.delay is None else self.delay + 1
        return 0 if rest or count < least or self.components not in (None, count) else count

    def limits(self, components: int, of_weights: Mapping[str, int]) -> Limits:
        """How memory is counted."""
        edges = [Exchange(i, j) for i, j in itertools.combinations(range(components), 2)]
        return Limits(
            (None,) * components,
            ring(edges, components, self.schedule, delay=self.delay),
            components if self.schedule == "pipeline" else 1,
            compressed=self.compress and self.schedule not in EXACT and components > 1,
            of_weights=of_weights,
        )


@dataclass(frozen=True)
class Way:
    """A way to have the model on the cards, or what it lacks. ``weights``: how the denoiser's are
    stored; ``others``: where the other models are, one of :data:`PLACES`, with ``home`` the card
    that has them; ``seats``: the cards that run each component (each rank, where tokens are shared
    out); ``needs``: bytes of each card that are needed, with them."""

    weights: str
    others: str
    home: int | None
    fits: bool
    seats: list[list[int]]
    needs: list[int]
    components: list[Use] = field(default_factory=list)
    cuts: tuple[str, ...] = ()

    @property
    def left_out(self) -> list[int]:
        """The cards for which there is nothing."""
        taken = {self.home, *itertools.chain(*self.seats)}
        return [i for i in range(len(self.needs)) if i not in taken]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values = vars(self) | {"components": [use.to_dict() for use in self.components]}
        return values | {"cuts": list(self.cuts), "left_out": self.left_out}


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
    settings: Settings | None = None,
    speeds: Sequence[float] | None = None,
    denoisers: int = 1,
) -> list[Way]:
    """For each way to store weights the first place for the other models with which the denoiser
    fits, a rank a card in their order; on all cards if it does there, else without the smallest
    ones. The closest one where none does.

    ``others``: bytes of the other models by name; ``cards``: bytes of each card; ``speeds``: how
    fast they are; ``denoisers``: how many of them the pipeline has, which are alike. Raises
    InputError where there are too few cards for the settings, PartitionError where there are too
    many components for the denoiser, and TokensError where its tokens cannot be shared out.
    """
    settings = settings or Settings()
    taken = _taken(cards, settings)
    if not taken:
        components = settings.components or (settings.delay or 0) + 1
        ranks = (1 + settings.split) * (components + settings.copies - 1)
        raise InputError(
            f"these settings have {ranks} ranks or more, a card each, and there are {len(cards)} "
            "cards: give more --cards, or take fewer components, a shorter stride, or guidance "
            "that is not split"
        )
    if settings.schedule != "sequence":
        most = len(units(captured))
        taken = [used for used in taken if settings.components_on(len(used)) <= most]
        if not taken:
            raise PartitionError(
                f"components={settings.components}: this denoiser can be split into at most {most}"
            )
    found = [_seated(captured, used, settings, speeds) for used in taken]
    return [_way(captured, kind, others, cards, found, denoisers) for kind in STORED]


def _taken(cards: Sequence[int], settings: Settings) -> list[list[int]]:
    """Cards that ranks may be on: all, then without the smallest, as many as settings can take."""
    falling = sorted(range(len(cards)), key=lambda i: (-cards[i], i))
    counts = range(len(cards), 0, -1)
    return [sorted(falling[:n]) for n in counts if settings.components_on(n)]


class _Cut:
    """A denoiser in components. ``seats``: the cards that run each."""

    def __init__(
        self,
        captured: Captured,
        seats: list[list[int]],
        settings: Settings,
        costs: Costs,
    ) -> None:
        self.seats = seats
        self._captured, self._settings, self._costs = captured, settings, costs
        self._owned = units(captured)

    def store(self, sizes: Mapping[str, int], decoded: int) -> None:
        """Weights take these bytes, and the largest, where it is decoded, so many."""
        self._limits = self._settings.limits(len(self.seats), sizes)
        self._decoded = decoded
        needs = Needs(self._captured, self._owned, self._limits)
        self._need = needs.matrix(self._limits) + decoded

    def closest(self, room: Sequence[int]) -> list[int]:
        """Bytes of each component under the cut that exceeds this room least."""
        starts = least(self._need, [max(r, 1) for r in room])
        edges = [0, *starts, len(self._owned)]
        return [int(self._need[a, b]) for a, b in itertools.pairwise(edges)]

    def fastest(self, room: Sequence[int]) -> tuple[list[Use], tuple[str, ...]]:
        """The components within this room, and where they begin."""
        within = replace(self._limits, each=tuple(r - self._decoded for r in room))
        copies = self._settings.copies
        parts = partition(
            self._captured, len(self.seats), costs=self._costs, copies=copies, limits=within
        )
        return _decoding(parts.memory(), self._decoded), parts.cuts or ()


class _Shared:
    """A denoiser whose tokens are shared out: each rank counts as one that has all of it. For
    this call one may hold less, which has nothing of a text; for another one it does not.
    ``seats``: the cards of each. Activations are those of all tokens, of whose keys and values each
    rank gets all."""

    def __init__(self, captured: Captured, seats: list[list[int]], settings: Settings) -> None:
        self.seats, self._settings = seats, settings
        shards(captured, len(seats))  # raises where that cannot be done
        self._whole = partition(captured, 1)
        self._uses: list[Use] = []

    def store(self, sizes: Mapping[str, int], decoded: int) -> None:
        """As :meth:`_Cut.store`."""
        self._whole.limits = self._settings.limits(1, sizes)
        self._uses = _decoding(self._whole.memory(), decoded) * len(self.seats)

    def closest(self, room: Sequence[int]) -> list[int]:
        """Bytes of each rank, whatever there is room for."""
        return [use.total for use in self._uses]

    def fastest(self, room: Sequence[int]) -> tuple[list[Use], tuple[str, ...]]:
        """What each rank needs; nothing is cut."""
        return self._uses, ()


def _seated(
    captured: Captured, used: list[int], settings: Settings, speeds: Sequence[float] | None
) -> _Cut | _Shared:
    """The denoiser on these cards."""
    count = settings.components_on(len(used))
    ranks = runners(count, settings.copies, len(used))
    seats = [[used[rank] for rank in of] for of in ranks]
    if settings.schedule == "sequence":
        return _Shared(captured, seats, settings)
    costs = estimate(captured)
    if speeds is not None:
        costs = at_speeds(costs, [speeds[i] for i in used], ranks)
    return _Cut(captured, seats, settings, costs)


def _decoding(uses: Sequence[Use], decoded: int) -> list[Use]:
    return [replace(use, activations=use.activations + decoded) for use in uses]


def _way(
    captured: Captured,
    kind: str,
    others: Mapping[str, int],
    cards: Sequence[int],
    found: Sequence[_Cut | _Shared],
    denoisers: int,
) -> Way:
    sizes, decoded = stored(captured, kind)
    sizes = {name: denoisers * nbytes for name, nbytes in sizes.items()}
    closest: Way | None = None
    for parts in found:
        parts.store(sizes, decoded)
        seats = parts.seats
        for place, home, beside in _places(others, len(cards)):
            room = [usable(c) - (beside if i == home else 0) for i, c in enumerate(cards)]
            each = [min(room[i] for i in of) for of in seats]
            wanted = parts.closest(each)
            if all(w <= r for w, r in zip(wanted, each, strict=True)) and min(room) >= 0:
                uses, cuts = parts.fastest(each)
                needs = _needs([u.total for u in uses], seats, len(cards), home, beside)
                return Way(kind, place, home, True, seats, needs, uses, cuts)
            needs = _needs(wanted, seats, len(cards), home, beside)
            way = Way(kind, place, home, False, seats, needs)
            if closest is None or _lack(way, cards) < _lack(closest, cards):
                closest = way
    assert closest is not None
    return closest


def _needs(
    wanted: Sequence[int], seats: Sequence[Sequence[int]], cards: int, home: int | None, beside: int
) -> list[int]:
    """Bytes of each card, of components that want so many."""
    by_card = {card: nbytes for nbytes, of in zip(wanted, seats, strict=True) for card in of}
    return [by_card.get(i, 0) + (beside if i == home else 0) for i in range(cards)]


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
    what = "rank" if found["schedule"] == "sequence" else "component"
    for way in found["ways"]:
        lines += _told(way, bool(found["others"]), what)
    return "\n".join(lines)


def _told(way: Mapping[str, Any], others: bool, what: str) -> list[str]:
    stored_as = "as they are" if way["weights"] == "plain" else f"in {way['weights']}"
    head = f"{way['weights']:<10} weights {stored_as}: "
    left = way["left_out"]
    each = ", ".join(f"card {i} {in_words(n)}" for i, n in enumerate(way["needs"]) if i not in left)
    place = {
        "on a card": f", all other models on card {way['home']}",
        "offloaded": f", the other models offloaded, in turn on card {way['home']}",
        "elsewhere": ", the other models on none of them" if others else "",
    }[way["others"]]
    without = f"; leave {_cards(left)} out" if left else ""
    if not way["fits"]:
        return [f"{head}does not fit; the closest would need {each}{place}{without}"]
    lines = [f"{head}fits, {each}{place}{without}"]
    for i, (use, of) in enumerate(zip(way["components"], way["seats"], strict=True)):
        words = Use(**{k: v for k, v in use.items() if k != "total"})
        lines.append(f"           {what} {i} on {_cards(of)}: {words}")
    return lines


def _cards(which: Sequence[int]) -> str:
    return f"card{'s' if len(which) > 1 else ''} {' and '.join(map(str, which))}"
