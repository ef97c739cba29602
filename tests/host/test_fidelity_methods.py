"""What asyncdiff is compared with: each method is exact where its paper says that it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asyncdiff import demo_model
from fidelity.distrifusion import DistriFusion
from fidelity.faster_diffusion import FasterDiffusion, paper_keys
from fidelity.grid import methods
from fidelity.macs import total
from fidelity.method import Method
from fidelity.simple import FewerSteps, GuidanceSplit

STEPS = 6


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = demo_model.load(dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, method: Method | None = None, steps: int = STEPS) -> torch.Tensor:
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    call = {"prompt": ["red heart", "cat face"], "generator": noise, "guidance_scale": 5.0}
    if method is not None:
        return method.run(pipe, call, steps)
    with torch.no_grad():
        images: torch.Tensor = pipe(**call, num_inference_steps=steps, output_type="pt").images
    return images.float()


@pytest.fixture(scope="module")
def plain(pipe: Any) -> torch.Tensor:
    return draw(pipe)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    "method",
    [
        FewerSteps(STEPS),
        GuidanceSplit(),
        FasterDiffusion("all keys", 2, range),
        DistriFusion(2, STEPS),
        DistriFusion(4, STEPS),
        DistriFusion(1, 1),
    ],
    ids=lambda m: m.name,
)
def test_exact_where_nothing_is_reused(pipe: Any, plain: torch.Tensor, method: Method) -> None:
    assert distance(draw(pipe, method), plain) < 1e-6


@pytest.mark.parametrize(
    "method",
    [FasterDiffusion("2", 2, lambda n: range(0, n, 2)), DistriFusion(2, 1), FewerSteps(4)],
    ids=lambda m: m.name,
)
def test_reuse_changes_the_picture_and_nothing_stays(
    pipe: Any, plain: torch.Tensor, method: Method
) -> None:
    assert 1e-4 < distance(draw(pipe, method), plain) < 1
    assert torch.equal(draw(pipe), plain)
    for module in pipe.unet.modules():
        assert "forward" not in module.__dict__


def test_an_exception_leaves_the_pipeline_as_it_was(pipe: Any, plain: torch.Tensor) -> None:
    for method in (FasterDiffusion("x", 1, range), DistriFusion(2, 1)):
        with pytest.raises(ZeroDivisionError), method.applied(pipe, STEPS):
            raise ZeroDivisionError
    assert torch.equal(draw(pipe), plain)


def test_the_encoder_runs_at_key_steps_only(pipe: Any) -> None:
    runs: list[int] = []
    hooks = [
        pipe.unet.down_blocks[1].resnets[0].register_forward_hook(lambda *_: runs.append(0)),
        pipe.unet.up_blocks[0].resnets[0].register_forward_hook(lambda *_: runs.append(1)),
    ]
    draw(pipe, FasterDiffusion("x", 2, lambda n: (0, 4)))
    for hook in hooks:
        hook.remove()
    assert runs == [0, 1, 1, 1, 1, 0, 1, 1]


def test_the_papers_key_steps() -> None:
    assert paper_keys(50) == (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert paper_keys(25)[0] == 0 and max(paper_keys(25)) < 25


def test_stale_activations_that_are_right_give_the_exact_result(pipe: Any) -> None:
    g = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 12, 32, 32, generator=g, dtype=torch.float64)
    text = pipe.encode_prompt(["red heart"], True)
    unet = pipe.unet
    want = unet(sample, 500, text, return_dict=False)[0]
    for patches in (2, 4):
        with DistriFusion(patches, 1).applied(pipe, STEPS), torch.no_grad():
            first = unet(sample, 500, text, return_dict=False)[0]
            again = unet(sample, 500, text, return_dict=False)[0]  # displaced, nothing moved
            other = unet(0.5 * sample, 400, text, return_dict=False)[0]
        assert distance(first, want) < 1e-12
        assert distance(again, want) < 1e-9
        exact = unet(0.5 * sample, 400, text, return_dict=False)[0]
        assert 1e-4 < distance(other, exact) < 0.7


def test_a_patch_is_what_its_device_computes(pipe: Any) -> None:
    """Against one convolution by hand: own rows fresh, the row beside them stale."""
    conv = pipe.unet.conv_in
    holder = SimpleNamespace(unet=torch.nn.Sequential(conv))
    old, new = torch.randn(2, 1, 12, 8, 8, dtype=torch.float64)
    with DistriFusion(2, 1).applied(holder, 2), torch.no_grad():
        holder.unet(old)
        got = holder.unet(new)
    for patch in (0, 1):
        seen = old.clone()
        rows = slice(4 * patch, 4 * patch + 4)
        seen[:, :, rows] = new[:, :, rows]
        assert torch.equal(got[:, :, rows], conv(seen)[:, :, rows])


def test_work_adds_up(pipe: Any) -> None:
    all_of_it = float(total(pipe)) * 50
    for method in methods("cpu", "ddim", 50, False):
        work = method.work(pipe, {}, 50)
        assert 0 < work.per_device <= work.critical * (1 + 1e-9) <= all_of_it * 1.01
        assert work.critical * method.devices > 0.2 * all_of_it
    one = FasterDiffusion("x", 1, range).work(pipe, {}, 50)
    assert one.critical == pytest.approx(all_of_it)
    assert DistriFusion(4, 1).work(pipe, {}, 50).critical == pytest.approx(all_of_it / 4)
    assert GuidanceSplit().work(pipe, {}, 50).critical == pytest.approx(all_of_it / 2)
    names = [m.name for m in methods("cpu", "ddim", 50, False)]
    assert len(names) == len(set(names))
