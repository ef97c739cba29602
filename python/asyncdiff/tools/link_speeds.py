"""How fast a machine's links are, for the doctor: one alone, both ways, and all at once."""

from __future__ import annotations

from typing import Any

import torch

from ..processes.team import Team
from ..runtime.cutting.link_speed import measured
from ..runtime.devices import Place


def add_speeds(links: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """The doctor's ``links``, with how fast each is: 10^9 bytes a second by itself, while its
    reverse sends too, and while all do; microseconds that a small bundle takes. By channels like an
    engine's, between ranks on GPUs ("cuda") or threads ("cpu"). With ``links_error`` instead where
    that cannot be done."""
    pairs = [(link["from"], link["to"]) for link in links]
    ranks = range(1 + max(max(pair) for pair in pairs))
    cuda = device == "cuda"
    places = [Place.here(torch.device("cuda", i) if cuda else torch.device(device)) for i in ranks]
    rounds = [[p] for p in pairs] + [[(a, b), (b, a)] for a, b in pairs if a < b] + [pairs]
    try:
        found = measured(places, rounds, Team())
    except Exception as error:  # no memory for it, or a GPU that is busy for too long
        return {"links": links, "links_error": str(error) or type(error).__name__}
    out = []
    for link, pair in zip(links, pairs, strict=True):
        alone, both, every = (r[pair] for r in found if pair in r)
        named = (("alone", alone), ("both_ways", both), ("all_pairs", every))
        speeds = {name: round(x.bytes_per_ms / 1e6, 3) for name, x in named}
        latency = round(alone.latency_ms * 1e3, 2)
        out.append(link | {"gb_per_s": speeds, "latency_us": latency})
    return {"links": out}
