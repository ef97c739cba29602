"""Errors of the exchange as objects: their texts whole, copies and pickles like the original."""

from __future__ import annotations

import copy
import pickle

import pytest

import asyncdiff_core as core

NOTHING = core.Layout([])


def failure(case: str) -> core.CoreError:
    fabric = core.HostFabric(2, deadline=0.01)
    channel = fabric.channel(0, [1], NOTHING, name="up")
    with pytest.raises(core.CoreError) as caught:
        if case == "timeout":
            channel.get(1, 0)
        elif case == "order":
            channel.release(1, 0)
        elif case == "abort":
            fabric.abort(1, "enough")
            fabric.check()
        else:
            channel.get(0, 0)
    return caught.value


@pytest.mark.parametrize("case", ["timeout", "order", "abort", "argument"])
def test_errors_can_be_copied_and_pickled(case: str) -> None:
    error = failure(case)
    pickles = [pickle.dumps(error, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for again in (copy.copy(error), copy.deepcopy(error), *map(pickle.loads, pickles)):
        assert type(again) is type(error)
        assert (again.args, vars(again)) == (error.args, vars(error))


# Of two, three and four bytes; with each offset some buffer's end lies inside one.
@pytest.mark.parametrize("character", ["é", "€", "𝄞"])
@pytest.mark.parametrize("offset", range(4))
def test_long_texts_are_cut_between_characters(character: str, offset: int) -> None:
    text = "x" * offset + character * 300
    fabric = core.HostFabric(2, deadline=0.01)
    channel = fabric.channel(0, [1], NOTHING, name=text)
    with pytest.raises(core.ExchangeTimeout) as timeout:
        channel.get(1, 0)
    assert timeout.value.channel == text
    with pytest.raises(core.ExchangeTimeout) as timeout:
        fabric.check()
    kept = timeout.value.channel
    assert text.startswith(kept) and 128 - 4 <= len(kept.encode()) < 128
    fabric.reset()
    fabric.abort(0, text)
    with pytest.raises(core.Aborted) as aborted:
        fabric.check()
    kept = str(aborted.value).partition(": ")[2]
    assert text.startswith(kept) and 512 - 4 <= len(kept.encode()) < 512
