"""What depends on the conditioning alone is computed once a generation, with the same bits."""

from __future__ import annotations

from typing import Any

import reference
import torch
from torch import fx

from asyncdiff import AsyncDenoiser
from asyncdiff.calls import parse
from asyncdiff.capture import capture
from asyncdiff.example_inputs import example_inputs
from asyncdiff.hoist import hoist, store
from asyncdiff.partition import partition

CPU = torch.device("cpu")


def kinds(program: fx.GraphModule) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def tiny() -> tuple[Any, dict[str, Any]]:
    unet = reference.denoiser("sd_seed1")
    return unet, example_inputs(unet, height=128, width=128)


def test_text_keys_and_values_leave_the_loop() -> None:
    unet, kwargs = tiny()
    captured = capture(unet, call := parse(unet, (), kwargs))
    attentions = sum(name.endswith("attn2") for name, _ in unet.named_modules())
    parts = partition(captured, 2, "estimate")
    found = 0
    for component in parts.components:
        program = parts.program(component.index, CPU)
        prelude, main = hoist(program)
        assert prelude is not None
        # Keys and values are products with the text; what the loop keeps of them are views.
        assert set(kinds(prelude)) == {"aten.linear.default"}
        found += len(kinds(prelude))
        assert len(kinds(main)) == len(kinds(program)) - len(kinds(prelude))
        values = [v for boundary in component.reads for v in boundary.values]
        reads = [torch.randn(v.meta["val"].shape) for v in values]
        inputs = [call.tensors[captured.inputs[n.name]] for n in component.inputs]
        (kept,) = (prelude(*inputs, *reads),)
        sent: list[torch.Tensor] = []
        again: list[torch.Tensor] = []
        with torch.no_grad():
            program.emit.hook = lambda t, i, v, out=sent: out.append(v)
            want = program(*inputs, *reads)
            main.emit.hook = lambda t, i, v, out=again: out.append(v)
            got = main(*inputs, *reads, *kept)
        assert all(torch.equal(a, b) for a, b in zip([*want, *sent], [*got, *again], strict=True))
    assert found == 2 * attentions


def test_kept_values_stay_where_they_are() -> None:
    first = store([torch.ones(2, 3).T], [])
    second = store([torch.zeros(2, 3).T], first)
    assert second[0] is first[0]
    assert second[0].stride() == (1, 3)
    assert (second[0] == 0).all()


def test_a_prompt_is_worked_on_once_a_generation() -> None:
    unet, kwargs = tiny()
    denoiser = AsyncDenoiser(unet, (), kwargs, devices=["cpu"] * 2, split="estimate")
    workers = denoiser._engine.workers  # type: ignore[union-attr]
    runs = [0, 0]
    for i, worker in enumerate(workers):
        prelude = worker.prelude
        assert prelude is not None

        def counted(*args: Any, i: int = i, prelude: Any = prelude) -> Any:
            runs[i] += 1
            return prelude(*args)

        counted.graph = prelude.graph  # type: ignore[attr-defined]
        worker.prelude = counted  # type: ignore[assignment]
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
