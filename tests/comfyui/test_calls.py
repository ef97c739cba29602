"""What ComfyUI does around the denoiser: conditions in several calls, other nodes, interruption."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("comfy", reason="COMFYUI names no folder of ComfyUI")
import comfy.context_windows
import comfy.controlnet
import comfy.hooks
import comfy.model_management as management
from comfy.patcher_extension import WrappersMP
from tiny_models import sample

from asyncdiff import AsyncDenoiser
from asyncdiff.errors import InputError


def counted(monkeypatch: Any) -> list[int]:
    """The branches of the denoiser's calls, in order."""
    calls: list[int] = []
    denoiser = AsyncDenoiser
    call = denoiser.call
    monkeypatch.setattr(
        denoiser, "call", lambda self, x, branch=0: (calls.append(branch), call(self, x, branch))[1]
    )
    return calls


@pytest.fixture
def apart(model: Any, monkeypatch: Any) -> None:
    """ComfyUI has no memory for two conditions in one batch."""
    monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 1e15)
    monkeypatch.setattr(management, "load_models_gpu", _loading(management.load_models_gpu))


def _loading(load: Any) -> Any:
    return lambda models, *_, **__: load(models)


@pytest.mark.parametrize("guidance", ["batched", "split"])
@pytest.mark.parametrize("schedule", ["asyncdiff", "wavefront"])
@pytest.mark.usefixtures("apart")
def test_conditions_in_two_calls(
    model: Any, spread: Any, monkeypatch: Any, schedule: str, guidance: str
) -> None:
    calls = counted(monkeypatch)
    devices = "cpu " * (4 if guidance == "split" else 2)
    settings = {"devices": devices, "schedule": schedule, "guidance": guidance}
    plain = sample(model, steps=12)
    split = sample(spread(model, **settings), steps=12)
    assert (plain - split).abs().max() <= 1e-4 * plain.std()
    assert calls == [0, 1] * 12
    late = sample(spread(model, **settings, warmup=4, exact_tail=1), steps=12)
    assert 1e-7 < (plain - late).norm() / plain.norm() < 5e-2


def test_conditions_that_begin_later(model: Any, spread: Any) -> None:
    late = {"start_percent": 0.4}
    plain, split = sample(model, more=late), sample(spread(model, warmup=2), more=late)
    assert (plain - split).norm() < 0.05 * plain.norm()


class Control(comfy.controlnet.ControlBase):
    """A ControlNet that adds the same to every step, and more to the first ones."""

    def get_control(self, x: Any, t: Any, cond: Any, count: int, options: Any) -> Any:
        random = torch.Generator().manual_seed(2)
        wide = torch.randn(len(x), 64, 8, 8, generator=random) * t.view(-1, 1, 1, 1) / 5
        return {"input": [], "middle": [wide], "output": [None, None, wide]}


@pytest.mark.parametrize("schedule", ["asyncdiff", "wavefront"])
def test_a_controlnet(model: Any, spread: Any, schedule: str) -> None:
    control = {"control": Control(), "control_apply_to_uncond": True}
    without, plain = sample(model, steps=15), sample(model, steps=15, more=control)
    assert (plain - without).norm() > 0.05 * plain.norm()
    split = sample(spread(model, schedule=schedule), steps=15, more=control)
    assert (plain - split).abs().max() <= 1e-4 * plain.std()
    split = sample(spread(model, schedule=schedule, warmup=4, exact_tail=1), steps=15, more=control)
    assert (plain - split).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("change", ["churn", "half"])
def test_levels_that_were_not_announced(
    model: Any, spread: Any, change: str, monkeypatch: Any, caplog: Any
) -> None:
    import comfy.samplers

    make = comfy.samplers.ksampler
    options = {"churn": {"s_churn": 5.0}, "half": {}}[change]
    monkeypatch.setattr(comfy.samplers, "ksampler", lambda name, *_, **__: make(name, options))
    if change == "half":
        euler = comfy.samplers.k_diffusion_sampling.sample_euler

        def sample_euler(denoise: Any, x: Any, sigmas: Any, **options: Any) -> Any:
            return euler(denoise, x, sigmas[:3] * 0.9, **options)

        monkeypatch.setattr(comfy.samplers.k_diffusion_sampling, "sample_euler", sample_euler)
    torch.manual_seed(0)  # of the churn
    plain = sample(model)
    torch.manual_seed(0)
    split = sample(spread(model, warmup=1))
    assert (plain - split).abs().max() <= 1e-4 * plain.std()
    assert "other noise levels than it announced" in caplog.text


def test_another_nodes_patches_are_refused(model: Any, spread: Any) -> None:
    split = spread(model)
    split.set_model_output_block_patch(lambda h, skip, options: (h * 1.1, skip))
    with pytest.raises(InputError, match=r"inside of the denoiser's layers \(output_block_patch"):
        sample(split)


def test_another_nodes_wrapper_is_refused(model: Any, spread: Any) -> None:
    split = spread(model)
    split.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "cache", lambda run, *a, **k: run(*a))
    with pytest.raises(InputError, match="Bypass one of the two"):
        sample(split)


def test_weights_that_hooks_change_are_refused(model: Any, spread: Any) -> None:
    hooks = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook()
    name = "diffusion_model.out.2.weight"
    hook.weights, hook.need_weight_init = {name: ("diff", (torch.ones(4, 32, 3, 3),))}, False
    hooks.add(hook)
    with pytest.raises(InputError, match="hooks"):
        sample(spread(model), more={"hooks": hooks})


def test_windows_of_frames_are_exact(model: Any, spread: Any, caplog: Any) -> None:
    split = spread(model, warmup=1)
    handler = comfy.context_windows.IndexListContextHandler
    model.model_options["context_handler"] = split.model_options["context_handler"] = handler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=8,
        context_overlap=4,
        dim=2,
    )
    plain, late = sample(model), sample(split)
    assert (plain - late).abs().max() <= 1e-4 * plain.std()
    assert "windows of frames" in caplog.text


def test_an_interrupted_run_leaves_nothing(model: Any, spread: Any, monkeypatch: Any) -> None:
    split = spread(model, schedule="wavefront", warmup=1)
    plain = sample(split, steps=10)
    import comfy.samplers

    def stopped(self: Any, *args: Any) -> Any:
        stopped.calls += 1
        if stopped.calls == 4:
            raise management.InterruptProcessingException
        return predict(self, *args)

    stopped.calls = 0
    predict = comfy.samplers.CFGGuider.predict_noise
    with monkeypatch.context() as patch:
        patch.setattr(comfy.samplers.CFGGuider, "predict_noise", stopped)
        with pytest.raises(management.InterruptProcessingException):
            sample(split, steps=10)
    assert (sample(split, steps=10) - plain).abs().max() == 0
