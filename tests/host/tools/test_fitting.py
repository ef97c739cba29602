"""What of a model fits on which cards: what ranks hold by the settings, and cards left out."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tiny_pipelines import tiny_sd3_transformer
from toys import Toy, toy_call

from asyncdiff import InputError, PartitionError
from asyncdiff.errors import TokensError
from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.example_inputs import example_inputs
from asyncdiff.graph.signature import parse
from asyncdiff.partition.memory import Use
from asyncdiff.partition.ownership import units
from asyncdiff.partition.partition import partition
from asyncdiff.tools.fitting import Settings, Way, fitting


@cache
def denoiser(kind: str) -> tuple[Captured, Use]:
    """Without weights, and what one card needs that has all of it."""
    if kind == "toy":
        module, call = Toy().double(), toy_call()
    else:
        module = tiny_sd3_transformer().to("meta")
        call = example_inputs(module)
    captured = capture(module, parse(module, (), call))
    return captured, partition(captured, 1).memory()[0]


def card(nbytes: float) -> int:
    """One of which so many bytes can be used."""
    return int((nbytes + 5e8) / 0.92) + 2


def plain(kind: str, cards: list[int], others: Any = None, **settings: Any) -> Way:
    """The way with weights as they are."""
    return fitting(denoiser(kind)[0], others or {}, cards, Settings(**settings))[0]


@pytest.mark.parametrize("kind", ["toy", "sd3"])
def test_a_card_that_holds_nothing_is_left_out(kind: str) -> None:
    whole = denoiser(kind)[1].total
    one = plain(kind, [card(1.1 * whole), card(0)])
    assert one.fits and one.seats == [[0]] and one.left_out == [1] and one.needs == [whole, 0]
    first = plain(kind, [card(0), card(1.1 * whole), card(1.1 * whole)])
    assert first.fits and first.seats == [[1], [2]] and first.left_out == [0]
    # All are used where that is possible.
    assert plain(kind, [card(1.1 * whole), card(0.6 * whole)]).seats == [[0], [1]]
    none = plain(kind, [card(0.1 * whole), card(0)])
    assert not none.fits


def test_a_card_without_a_component_may_have_the_other_models() -> None:
    whole = denoiser("sd3")[1].total
    way = plain("sd3", [card(1.1 * whole), card(whole)], {"vae": whole // 2}, components=1)
    assert way.fits and (way.others, way.home) == ("on a card", 1)
    assert way.needs == [whole, whole // 2] and way.left_out == []
    # Not where it is too small for them.
    way = plain("sd3", [card(1.1 * whole), card(whole / 4)], {"vae": whole // 2}, components=1)
    assert way.fits and way.others == "elsewhere" and way.left_out == [1]


def test_ranks_that_share_out_tokens_hold_all_weights() -> None:
    whole = denoiser("sd3")[1]
    cards = [card(0.9 * whole.total)] * 2
    assert plain("sd3", cards).fits
    way = plain("sd3", cards, schedule="sequence")
    assert not way.fits and min(filter(None, way.needs)) >= whole.weights
    way = plain("sd3", [card(2 * whole.total)] * 2, schedule="sequence")
    assert way.fits and way.seats == [[0], [1]] and way.cuts == ()
    assert [use.weights for use in way.components] == [whole.weights] * 2
    assert way.needs == [use.total for use in way.components]
    # A byte a weight is less there, too.
    ways = fitting(denoiser("sd3")[0], {}, [card(9e9)] * 2, Settings(schedule="sequence"))
    assert ways[1].components[0].weights < whole.weights / 2
    with pytest.raises(TokensError):
        plain("toy", [card(9e9)] * 2, schedule="sequence")


def test_components_are_as_many_as_was_said() -> None:
    cards = [card(9e9), card(1e9), card(9e9)]
    way = plain("sd3", cards, components=2)
    assert way.seats == [[0], [2]] and way.left_out == [1] and len(way.cuts) == 1
    with pytest.raises(InputError, match="have 4 ranks or more, a card each, and there are 3"):
        plain("sd3", cards, components=4)
    count = len(units(denoiser("toy")[0])) + 1
    with pytest.raises(PartitionError, match=f"components={count}: this denoiser can be split"):
        plain("toy", [card(9e9)] * count, components=count)


def test_copies_of_a_stride_hold_the_last_component() -> None:
    way = plain("sd3", [card(9e9)] * 3, stride=2)
    assert way.seats == [[0], [1, 2]] and len(way.components) == 2
    assert way.needs[1] == way.needs[2] == way.components[1].total
    # The smallest of the cards that have it decides.
    whole = denoiser("sd3")[1].total
    way = plain("sd3", [card(9e9), card(9e9), card(0.3 * whole)], stride=2, components=2)
    assert way.fits and max(way.needs[1:]) <= 0.3 * whole < way.needs[0]
    with pytest.raises(InputError, match="2 ranks or more"):
        plain("sd3", [card(9e9)], stride=2)


def test_split_guidance_has_the_denoiser_twice() -> None:
    whole = denoiser("sd3")[1]
    way = plain("sd3", [card(9e9)] * 5, split=True)
    assert way.seats == [[0, 2], [1, 3]] and way.left_out == [4]
    assert sum(way.needs) >= 2 * whole.weights
    with pytest.raises(InputError, match="2 ranks or more"):
        plain("sd3", [card(9e9)], split=True)


def test_mailboxes() -> None:
    """Of compressed bundles, of waves, and of a picture for each component."""
    cards = [card(9e9)] * 3
    usual, less, late, many = (
        plain("toy", cards, **settings).components[-1]
        for settings in (
            {},
            {"compress": True},
            {"schedule": "wavefront", "delay": 2},
            {"schedule": "pipeline"},
        )
    )
    assert less.mailboxes == pytest.approx(2.5 * usual.mailboxes)
    assert late.mailboxes > usual.mailboxes
    assert many.mailboxes == pytest.approx(3 * usual.mailboxes)
    assert many.activations == pytest.approx(3 * usual.activations)
    # Exact steps are not compressed.
    same = plain("toy", cards, schedule="pipeline", compress=True).components[-1]
    assert same.mailboxes == many.mailboxes
