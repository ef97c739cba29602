"""What denoisers do that the exporter does not see by itself."""

from __future__ import annotations

import contextlib
import gc
import os
from typing import Any

import pytest
import torch
from export_cache import uncached
from torch import nn
from torch.export import _trace
from torch.nn.utils import parametrizations
from toys import toy, toy_call

from asyncdiff import AsyncDenoiser, CaptureError, progress
from asyncdiff.graph.capture import capture
from asyncdiff.graph.signature import parse
from asyncdiff.graph.tracing import traced
from asyncdiff.graph.tracing.symbols import open_sizes
from asyncdiff.memory import uncollected


class WritesData(nn.Module):
    """Writes into ``.data`` of what it made, as CogVideoX does with its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        place = sample.new_zeros(sample.shape)
        place.data[:, 1:].copy_(self.layer(sample)[:, 1:] + timestep)
        place[:, :2].fill_diagonal_(0.5)  # as attention that is perturbed does
        return place + sample


def test_writes_that_the_exporter_does_not_trace() -> None:
    module = WritesData().eval().requires_grad_(False)
    sample, time = torch.randn(2, 4), torch.tensor(3.0)
    denoiser = AsyncDenoiser(module, components=2, split="estimate")
    with contextlib.closing(denoiser), denoiser.generation([3.0]):
        torch.testing.assert_close(denoiser(sample, time), module(sample, time))


def test_symbols_are_looked_for_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = getattr(_trace, "_replace_unbacked_bindings", None)
    if bind is None:
        pytest.skip("this torch notes no symbols of nodes")
    uncached(monkeypatch)
    looked: list[Any] = []
    monkeypatch.setattr(
        _trace, "_replace_unbacked_bindings", lambda graph: looked.append(graph) or bind(graph)
    )
    module = toy()
    text = torch.randn(2, 7, 6, dtype=torch.float64)
    each = [toy_call(), toy_call() | {"encoder_hidden_states": text}]
    calls = [parse(module, (), call) for call in each]
    capture(module, calls[0])
    assert not looked
    capture(module, calls[0], open_sizes(*(call.signature for call in calls)))
    assert len(looked) == 1


def test_source_lines_are_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes a fourth of an export; torch's own exports have them as ever afterwards."""
    module, given = toy(), toy_call(1)
    uncached(monkeypatch)
    captured = capture(module, parse(module, (), given))
    assert not any("stack_trace" in node.meta for node in captured.nodes)
    own = torch.export.export(module, (), given, strict=False).graph.find_nodes(
        op="call_function", target=torch.ops.aten.linear.default
    )
    assert own and all(node.stack_trace for node in own)


def test_weights_made_in_inference_mode() -> None:
    """They ask for gradients, as new parameters do, which cannot be told to any tensor made of them
    outside of that mode."""
    with torch.inference_mode():
        module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    sample = torch.randn(2, 4)
    denoiser = AsyncDenoiser(module, components=2, split="estimate")
    with contextlib.closing(denoiser), denoiser.generation([3.0]), torch.no_grad():
        torch.testing.assert_close(denoiser(sample), module(sample))
    assert all(weight.requires_grad for weight in module.parameters())


def test_weights_that_are_made_of_others() -> None:
    module = toy()
    parametrizations.orthogonal(module.mix)
    parametrizations.weight_norm(module.text)
    call = toy_call(2)
    denoiser = AsyncDenoiser(module, components=2, split="estimate")
    with contextlib.closing(denoiser), denoiser.generation([0.5]):
        torch.testing.assert_close(denoiser(**call), module(**call))


def test_an_export_that_goes_on_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others in a group wait for it, as long as they hear of it."""

    class Many(nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            for _ in range(200):
                sample = sample + timestep
            return sample

    seen: list[str] = []
    sample, time = torch.randn(2, 4), torch.tensor(0.5)
    monkeypatch.setattr(traced, "_EVERY", 50)
    with progress.watched(seen.append):
        capture(Many(), parse(Many(), (sample, time), {}))
    assert sum("exporting the denoiser: " in x and "operations" in x for x in seen) >= 2


def test_a_process_made_by_fork_meanwhile_collects() -> None:
    """The thread that would begin to collect again is not in it."""
    with uncollected():
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitpid(child, 0)[1] == 0 and not gc.isenabled()


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_collected_while_the_exporter_runs(
    monkeypatch: pytest.MonkeyPatch, collecting: bool, fails: bool
) -> None:
    found, before, export = list[bool](), gc.isenabled(), torch.export.export

    class Own(nn.Module):  # no test has exported it before
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return sample + timestep

    def exporting(*args: Any, **kwargs: Any) -> Any:
        found.append(gc.isenabled())
        if fails:
            raise ValueError("no")
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", exporting)
    try:
        (gc.enable if collecting else gc.disable)()
        with pytest.raises(CaptureError) if fails else contextlib.nullcontext():
            capture(Own(), parse(Own(), (torch.ones(2, 3), torch.tensor(0.5)), {}))
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()
    assert found and not any(found)
