"""What the latents have no part in is taken out of what runs every time, with the same bits."""

from __future__ import annotations

from typing import Any

import reference
import torch
from torch import fx

from asyncdiff import AsyncDenoiser
from asyncdiff.graph.capture import Captured, capture
from asyncdiff.graph.example_inputs import example_inputs
from asyncdiff.graph.hoist import Hoisted, hoist, store
from asyncdiff.graph.program import NBYTES, run_program
from asyncdiff.graph.row import padded
from asyncdiff.graph.signature import Call, Role, parse
from asyncdiff.partition.partition import Component, partition

CPU = torch.device("cpu")


def kinds(program: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def tiny() -> tuple[Any, dict[str, Any]]:
    unet = reference.denoiser("small")
    return unet, example_inputs(unet, height=64, width=64)


def same_bits(
    program: fx.GraphModule, parts: Hoisted, component: Component, captured: Captured, call: Call
) -> bool:
    """Whether a program and what was made of it return and push the same."""
    values = [v for boundary in component.reads for v in boundary.values]
    reads = [torch.randn(v.meta["val"].shape, dtype=v.meta["val"].dtype) for v in values]
    inputs = [call.tensors[captured.inputs[n.name]] for n in component.inputs]
    sent: list[torch.Tensor] = []
    again: list[torch.Tensor] = []
    absent = [None] * len(reads)
    with torch.no_grad():
        want = run_program(program, [*inputs, *reads], lambda t, i, v: sent.append(v))
        kept = [] if parts.once is None else parts.once(*inputs, *absent)
        row = [] if parts.timed is None else parts.timed(*inputs, *absent, *kept)
        # Nothing asks for the time any more.
        roles = [captured.signature.inputs[captured.inputs[n.name]].role for n in component.inputs]
        moving = [None if r is Role.TIMESTEP else x for r, x in zip(roles, inputs, strict=True)]
        given = [*moving, *reads, *kept, *row]
        got = run_program(parts.main, given, lambda t, i, v: again.append(v))
    assert len(sent) == len(again) > 0 or not component.sends
    return all(torch.equal(a, b) for a, b in zip([*want, *sent], [*got, *again], strict=True))


def test_text_and_time_leave_the_loop() -> None:
    unet, kwargs = tiny()
    captured = capture(unet, call := parse(unet, (), kwargs))
    attentions = sum(name.endswith("attn2") for name, _ in unet.named_modules())
    blocks = sum(name.endswith("time_emb_proj") for name, _ in unet.named_modules())
    parts = partition(captured, 2, "estimate")
    found = rows = 0
    for component in parts.components:
        program = parts.program(component.index, CPU)
        split = hoist(program)
        assert split.once is not None and split.timed is not None
        # Keys and values are products with the text; what the loop keeps of them are views.
        assert set(kinds(split.once)) == {"aten.linear.default"}
        found += len(kinds(split.once))
        # A row has what each block makes of the time embedding; the views of it stay.
        (returned,) = split.timed.graph.find_nodes(op="output")
        assert {str(n.target) for n in returned.args[0]} == {"aten.linear.default"}
        rows += len(returned.args[0])
        timed = [n for n in component.nodes if n in captured.timed and n not in captured.views]
        assert len(timed) > len(returned.args[0])
        assert not {n.name for n in timed} & {
            n.name for n in split.main.graph.nodes if n.op == "call_function"
        }
        assert split.conditions == set()
        assert same_bits(program, split, component, captured, call)
    assert (found, rows) == (2 * attentions, blocks)


def test_rows_may_depend_on_the_conditioning_too() -> None:
    unet = reference.denoiser("small_xl")
    kwargs = example_inputs(unet)
    captured = capture(unet, call := parse(unet, (), kwargs))
    parts = partition(captured, 2, "estimate")
    for component in parts.components:
        program = parts.program(component.index, CPU)
        split = hoist(program)
        assert split.once is not None and split.timed is not None
        names = {captured.signature.inputs[captured.inputs[n]].name for n in split.conditions}
        assert names == {"added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"}
        # What depends on the text alone is not computed again for each row.
        once = {n.name for n in split.once.graph.nodes if n.op == "call_function"}
        assert not once & {n.name for n in split.timed.graph.nodes if n.op == "call_function"}
        assert same_bits(program, split, component, captured, call)


def test_large_values_stay_where_rows_would_be_too_large() -> None:
    unet, kwargs = tiny()
    captured = capture(unet, call := parse(unet, (), kwargs))
    parts = partition(captured, 1, "estimate")
    (component,) = parts.components
    sizes = {}
    for most in (1 << 20, 2000, 300, 0):
        program = parts.program(0, CPU)
        split = hoist(program, most)
        assert split.timed is not None
        (returned,) = split.timed.graph.find_nodes(op="output")
        sizes[most] = sum(padded(n.meta[NBYTES]) for n in returned.args[0])
        assert same_bits(program, split, component, captured, call)
    # Products of the embedding give way to the embedding, which they all are made of, and that to
    # the timestep.
    assert sizes[1 << 20] > 2000 >= sizes[2000] > 300 > sizes[300] == sizes[0] == padded(8)


class Direct(torch.nn.Module):
    """Reads the timestep where it reads the latents."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample * timestep[:, None] + 1


def test_a_timestep_that_is_read_directly_is_in_its_row() -> None:
    module = Direct()
    kwargs = {"sample": torch.randn(3, 4), "timestep": torch.tensor([7.0, 8.0, 9.0])}
    captured = capture(module, call := parse(module, (), kwargs))
    parts = partition(captured, 1, "estimate")
    program = parts.program(0, CPU)
    split = hoist(program)
    assert split.once is None and split.timed is not None and kinds(split.timed) == []
    assert same_bits(program, split, parts.components[0], captured, call)


def test_programs_get_code_when_they_are_called() -> None:
    unet, kwargs = tiny()
    captured = capture(unet, call := parse(unet, (), kwargs))
    parts = partition(captured, 2, "estimate")
    program = parts.program(0, CPU, lambda name, device: captured.weights[name])
    hoisted = hoist(program)
    made = [hoisted.once, hoisted.timed, hoisted.main]
    assert not any("_code" in vars(part) for part in (program, *made))
    assert same_bits(program, hoisted, parts.components[0], captured, call)
    assert all("_code" in vars(part) for part in (program, *made))


def test_kept_values_stay_where_they_are() -> None:
    first = store([torch.ones(2, 3).T], [])
    second = store([torch.zeros(2, 3).T], first)
    assert second[0] is first[0]
    assert second[0].stride() == (1, 3)
    assert (second[0] == 0).all()


def test_a_prompt_is_worked_on_once_a_generation() -> None:
    unet, kwargs = tiny()
    denoiser = AsyncDenoiser(unet, (), kwargs, devices=["cpu"] * 2, split=reference.SMALL["split"])
    workers = denoiser._engine.workers  # type: ignore[union-attr]
    runs = [0, 0]
    for i, worker in enumerate(workers):
        prelude = worker.program.prelude
        assert prelude is not None

        def counted(*args: Any, i: int = i, prelude: Any = prelude) -> Any:
            runs[i] += 1
            return prelude(*args)

        counted.graph = prelude.graph  # type: ignore[attr-defined]
        worker.program.prelude = counted  # type: ignore[assignment]
    times = torch.tensor([900, 600, 300])
    results = []
    for prompt in (kwargs["encoder_hidden_states"], -kwargs["encoder_hidden_states"]):
        with denoiser.generation(times):
            for t in times:
                call = kwargs | {"timestep": t, "encoder_hidden_states": prompt}
                (noise,) = denoiser(**call)
        results.append(noise)
    assert runs == [2, 2]
    assert not torch.equal(*results)
    denoiser.close()
