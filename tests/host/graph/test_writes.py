"""What was made in inference mode, where torch counts no writes: known again, and never wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser, InputError
from asyncdiff.graph import writes
from asyncdiff.graph.writes import Seen, Writes, bits
from asyncdiff.runtime.rows import Rows
from asyncdiff.runtime.worker import Worker

SPLIT = [["enter", "down"], ["mix", "up", "leave"]]
STEPS = 10


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many rows were computed, and how many inputs were copied to ranks."""
    counts = {"rows": 0, "copies": 0}
    execute, take = Rows.execute, Worker._take

    def counted_row(rows: Rows) -> Any:
        counts["rows"] += 1
        return execute(rows)

    def counted_copies(worker: Worker, values: dict[int, torch.Tensor], caller: Any) -> None:
        counts["copies"] += len([i for i in values if i in worker.program.static])
        take(worker, values, caller)

    monkeypatch.setattr(Rows, "execute", counted_row)
    monkeypatch.setattr(Worker, "_take", counted_copies)
    return counts


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host looks at nothing before it is to."""
    monkeypatch.setattr(writes, "_waits", lambda device: True)


def run(
    denoiser: AsyncDenoiser, change: int | None = None, written: str = "text"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A generation of inputs that are made in the mode which is on; ``change``: written to from
    that step on."""
    call = {name: tensor.clone() for name, tensor in toy_call().items()}
    latents, text = call["sample"], call["encoder_hidden_states"]
    times = torch.arange(900, 900 - 10 * STEPS, -10)
    with denoiser.generation(times):
        for k, t in enumerate(times):
            if k == change:
                (text if written == "text" else times).mul_(2)
            latents = latents - 0.1 * denoiser(latents, t, encoder_hidden_states=text)[0]
    return latents, call


def spread(**settings: Any) -> AsyncDenoiser:
    ranks = 4 if settings.get("guidance") == "split" else 2
    return AsyncDenoiser(toy(), devices=["cpu"] * ranks, split=SPLIT, **settings)


@pytest.mark.parametrize("guidance", ["batched", "split"])
@pytest.mark.parametrize("gpu", [False, True])
def test_as_much_is_kept_as_without(
    done: dict[str, int], guidance: str, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu:
        monkeypatch.setattr(writes, "_waits", lambda device: True)
    denoiser = spread(guidance=guidance)
    results = []
    for inference in (False, True, True):
        with torch.inference_mode(inference):
            run(denoiser)
            done.update(rows=0, copies=0)
            results.append((run(denoiser)[0].clone(), dict(done)))
    denoiser.close()
    for latents, counts in results:
        assert torch.equal(latents, results[0][0])
        assert counts == results[0][1]
    assert results[0][1]["rows"] == 0


def test_what_is_written_in_between_counts() -> None:
    denoiser = spread()
    for change in (1, STEPS // 2):
        want, _ = run(denoiser, change)
        with torch.inference_mode():
            got, _ = run(denoiser, change)
        assert torch.equal(got, want)
    denoiser.close()


@pytest.mark.parametrize("written", ["text", "times"])
def test_what_is_found_late_is_an_error(written: str, like_a_gpu: None) -> None:
    denoiser = spread()
    with torch.inference_mode():
        want, _ = run(denoiser)
        for change in (1, STEPS - 1):
            with pytest.raises(InputError, match="Pass another tensor instead"):
                run(denoiser, change, written)
        assert torch.equal(run(denoiser)[0], want)
    denoiser.close()


def test_bits_are_compared() -> None:
    with torch.inference_mode():
        tensors = [
            torch.tensor([float("nan"), 1.0]),
            torch.tensor(3.0, dtype=torch.bfloat16),
            torch.randn(4, 6, dtype=torch.float16).t(),
            torch.tensor([[True], [False]]),
            torch.empty(0, 3),
        ]
    look = Writes()
    for tensor in tensors:
        seen = Seen(tensor)
        assert look.same(tensor, seen)
        assert not look.same(tensor.clone(), seen)
        if tensor.numel():
            with torch.inference_mode():
                tensor.zero_()
            assert not look.same(tensor, seen)


def test_bytes_of_any_tensor() -> None:
    one = torch.tensor(2.5)
    for tensor in (one, one.expand(1), one.expand(1, 1), torch.tensor([2.5, 0.0])[::2]):
        assert bits(tensor).tolist() == bits(torch.tensor([2.5])).tolist()
    assert bits(one.expand(2)).tolist() == 2 * bits(one).tolist()
    assert bits(torch.empty(0)).numel() == 0
