"""What asyncdiff is compared with: each method is exact where its paper says that it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from asyncdiff.demo import model as demo_model
from asyncdiff_bench.errors import BenchError
from fidelity.chosen import Chosen
from fidelity.distrifusion import DistriFusion
from fidelity.faster_diffusion import FasterDiffusion, paper_keys
from fidelity.grid import methods
from fidelity.macs import total, within
from fidelity.measured import speedup
from fidelity.method import Method
from fidelity.simple import FewerSteps, GuidanceSplit

STEPS = 5


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = demo_model.load(dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, method: Method | None = None, steps: int = STEPS) -> torch.Tensor:
    noise = [torch.Generator().manual_seed(0)]
    call = {"prompt": ["cat face"], "generator": noise, "guidance_scale": 5.0}
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
        Chosen("balanced", 2, "cpu", guided=True),  # few steps are exact
        FasterDiffusion("all keys", 2, range),
        DistriFusion(4, STEPS),
        *(
            pytest.param(m, marks=pytest.mark.slow)
            for m in (DistriFusion(2, STEPS), DistriFusion(1, 1))
        ),
    ],
    ids=lambda m: m.name,
)
def test_exact_where_nothing_is_reused(pipe: Any, plain: torch.Tensor, method: Method) -> None:
    assert distance(draw(pipe, method), plain) < 1e-6


@pytest.mark.parametrize(
    "method",
    [
        FasterDiffusion("2", 2, lambda n: range(0, n, 2)),
        *(pytest.param(m, marks=pytest.mark.slow) for m in (DistriFusion(2, 1), FewerSteps(4))),
    ],
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
    assert runs == [0, 1, 1, 1, 1, 0, 1]


def test_the_papers_key_steps() -> None:
    assert paper_keys(50) == (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert paper_keys(25)[0] == 0 and max(paper_keys(25)) < 25


@pytest.mark.slow
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


def displaced(layer: Any, patches: int, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """What ``layer`` makes of ``new`` when the step before had ``old``."""
    holder = SimpleNamespace(unet=torch.nn.Sequential(layer))
    with DistriFusion(patches, 1).applied(holder, 2), torch.no_grad():
        holder.unet(old)
        return holder.unet(new)


@pytest.mark.parametrize("patches", [1, 2, 4])
@pytest.mark.parametrize(
    "kind", ["convolution", "halving convolution", "wide convolution", "self-attention"]
)
def test_a_patch_is_what_its_device_computes(pipe: Any, kind: str, patches: int) -> None:
    """By hand: the layer on a picture whose own rows are fresh and all others stale."""
    unet = pipe.unet
    layer, shape = {
        "convolution": (unet.conv_out, (2, 64, 16, 8)),
        "halving convolution": (unet.down_blocks[0].downsamplers[0].conv, (2, 64, 16, 8)),
        "wide convolution": (
            torch.nn.Conv2d(3, 5, 5, padding=2, dtype=torch.float64).requires_grad_(False),
            (2, 3, 16, 8),
        ),
        "self-attention": (
            unet.mid_block.attentions[0].transformer_blocks[0].attn1,
            (2, 64, 160),
        ),
    }[kind]
    dim = 1 if len(shape) == 3 else 2
    g = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    got = displaced(layer, patches, old, new)
    for patch in range(patches):
        seen = old.clone()
        own = slice_of(new, patch, patches, dim)
        slice_of(seen, patch, patches, dim).copy_(own)
        want = slice_of(layer(seen), patch, patches, dim)
        torch.testing.assert_close(slice_of(got, patch, patches, dim), want)
    assert patches == 1 or distance(got, layer(new)) > 1e-3


def slice_of(x: torch.Tensor, patch: int, patches: int, dim: int) -> torch.Tensor:
    size = x.shape[dim] // patches
    return x.narrow(dim, patch * size, size)


def test_statistics_are_the_stale_ones_corrected() -> None:
    """By hand: stale whole + own fresh - own stale; the patch's own where no variance is left."""
    norm = torch.nn.GroupNorm(1, 1, eps=1e-5, dtype=torch.float64)
    # The second patch was wild and is calm now: correcting leaves it a negative variance.
    old = torch.tensor([[0.0, 1.0], [8.0, -8.0]], dtype=torch.float64).view(1, 1, 2, 2)
    new = torch.tensor([[0.5, 2.0], [6.0, 5.0]], dtype=torch.float64).view(1, 1, 2, 2)
    got = displaced(norm, 2, old, new)
    fell_back = []
    for patch in (0, 1):
        was, now = old[0, 0, patch], new[0, 0, patch]
        mean = old.mean() + now.mean() - was.mean()
        variance = old.square().mean() + now.square().mean() - was.square().mean() - mean**2
        fell_back.append(bool(variance < 0))
        if variance < 0:
            variance = now.square().mean() - now.mean() ** 2
        torch.testing.assert_close(got[0, 0, patch], (now - mean) / (variance + 1e-5).sqrt())
    assert fell_back == [False, True]


def test_the_first_layer_sees_fresh_latents(pipe: Any) -> None:
    """Every device has all latents: they are gathered after each step."""
    unet = pipe.unet
    with DistriFusion(2, 1).applied(pipe, STEPS):
        assert "forward" not in unet.conv_in.__dict__ and "forward" in unet.conv_out.__dict__


def test_half_precision_keeps_its_type_and_its_range() -> None:
    norm = torch.nn.GroupNorm(2, 4).bfloat16()
    x = torch.full((1, 4, 4, 4), 300.0, dtype=torch.bfloat16)
    got = displaced(norm, 2, x, x)
    assert got.dtype == torch.bfloat16 and bool(got.isfinite().all())


def test_a_forward_that_was_there_before_comes_back(pipe: Any) -> None:
    """Hooks of accelerate put one on modules; a method must not take it away."""
    unet = pipe.unet
    module = unet.down_blocks[0]
    mine = module.forward
    module.forward = mine
    try:
        for method in (FasterDiffusion("x", 1, range), DistriFusion(2, 1)):
            with pytest.raises(ZeroDivisionError), method.applied(pipe, STEPS):
                raise ZeroDivisionError
            assert module.__dict__["forward"] is mine and pipe.unet is unet
            assert "forward" not in unet.__dict__
    finally:
        del module.forward


def test_prior_noise_is_added_in_the_second_half(pipe: Any) -> None:
    with FasterDiffusion("x", 1, range, prior_noise=True).applied(pipe, 4):
        pipe.scheduler.set_timesteps(4)
        assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
        first = latents = torch.randn(1, 12, 4, 4, dtype=torch.float64)
        nothing = torch.zeros_like(first)
        added = []
        for t in pipe.scheduler.timesteps:
            plain = type(pipe.scheduler).step(pipe.scheduler, nothing, t, latents).prev_sample
            (noisy, *_) = pipe.scheduler.step(nothing, t, latents, return_dict=False)
            added.append(bool((noisy - plain).abs().max() > 0))
            if added[-1]:
                torch.testing.assert_close(noisy - plain, 0.003 * first)
            latents = noisy
    assert added == [False, True, True, False]  # for 749, 499, 249, and the result
    assert "step" not in pipe.scheduler.__dict__


def test_prior_noise_changes_the_picture(pipe: Any, plain: torch.Tensor) -> None:
    noisy = draw(pipe, FasterDiffusion("x", 1, range, prior_noise=True))
    assert 1e-4 < distance(noisy, plain) < 0.2


def test_what_cannot_be_is_said(pipe: Any) -> None:
    for patches, synchronous in ((0, 1), (2, 0)):
        with pytest.raises(BenchError, match="synchronous"):
            DistriFusion(patches, synchronous)
    with pytest.raises(BenchError, match="device"):
        FasterDiffusion("x", 0, range)
    with pytest.raises(BenchError, match="sampler steps"):
        FewerSteps(0)
    late = FasterDiffusion("late", 1, lambda n: (0, n))
    with pytest.raises(BenchError, match=r"key steps \[5\] are not among 5"):
        draw(pipe, late)
    with pytest.raises(BenchError, match="fewer patches"):  # 8 rows in the lowest level
        draw(pipe, DistriFusion(16, 1))
    with pytest.raises(BenchError, match="fewer patches"):  # patches of one row cannot be halved
        displaced(pipe.unet.down_blocks[0].downsamplers[0].conv, 4, *torch.zeros(2, 1, 64, 4, 4))


@pytest.mark.slow
def test_work_adds_up(pipe: Any) -> None:
    all_of_it = float(total(pipe)) * 50
    for method in methods("cpu", "ddim", 50, ["a", "b"], True, False):
        work = method.work(pipe, {}, 50)
        assert 0 < work.per_device <= work.critical * (1 + 1e-9) <= all_of_it * 1.01
        assert work.critical * method.devices > 0.2 * all_of_it
    one = FasterDiffusion("x", 1, range).work(pipe, {}, 50)
    assert one.critical == pytest.approx(all_of_it)
    assert DistriFusion(4, 1).work(pipe, {}, 50).critical == pytest.approx(all_of_it / 4)
    assert GuidanceSplit().work(pipe, {}, 50).critical == pytest.approx(all_of_it / 2)
    alone = GuidanceSplit().work(pipe, {"guidance_scale": 1.0}, 50)
    assert alone.critical == pytest.approx(all_of_it)
    # Key steps 0 and 4 of 6 on two devices: decoders of four steps take two turns, of two one.
    encoder = within(pipe, ["conv_in", "down_blocks.0", "down_blocks.1", "down_blocks.2"])
    encoder += within(pipe, ["mid_block"])
    two = FasterDiffusion("x", 2, lambda n: (0, 4)).work(pipe, {}, 6)
    assert two.critical == pytest.approx(2 * encoder + 3 * (total(pipe) - encoder))
    names = [m.name for m in methods("cpu", "ddim", 50, ["a", "b"], True, False)]
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_macs_are_what_torch_counts(pipe: Any) -> None:
    """Independent of the capture: the UNet run under torch's own counter, by module."""
    text = torch.zeros(2, 77, pipe.unet.config.cross_attention_dim, dtype=torch.float64)
    counter = FlopCounterMode(display=False)
    # The counter does not know the CPU's fused attention.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        pipe.unet(torch.zeros(2, 12, 32, 32, dtype=torch.float64), 500, text)
    flops = {k: sum(v.values()) for k, v in counter.get_flop_counts().items()}
    root = type(pipe.unet).__name__
    # Of the prompt or of the timestep alone.
    ahead = ("attn2.to_k", "attn2.to_v", "time_emb_proj", f"{root}.time_embedding")
    computed_ahead = sum(v for k, v in flops.items() if k.endswith(ahead) and k.startswith(root))
    assert total(pipe) == (flops[root] - computed_ahead) // 2
    mid = flops[f"{root}.mid_block"] - sum(
        v for k, v in flops.items() if "mid_block" in k and k.endswith(ahead)
    )
    assert within(pipe, ["mid_block"]) == mid // 2


@pytest.mark.slow
def test_a_quality_is_what_it_picks(pipe: Any, plain: torch.Tensor) -> None:
    four = Chosen("fast", 4, "cpu", guided=True)
    settings = four.settings(pipe, 12)
    assert (settings["components"], settings["guidance"]) == (2, "split")
    exact = Chosen("exact", 4, "cpu", guided=True).work(pipe, {}, 12).critical
    assert four.work(pipe, {}, 12).critical < exact == pytest.approx(float(total(pipe)) * 6)
    longer, two = draw(pipe, steps=12), Chosen("balanced", 2, "cpu", guided=True)
    assert 0 < distance(draw(pipe, two, 12), longer) < 0.2
    # Exact steps that are split cost less than those that are run one component after another.
    chain = two._method(two._picked(pipe, 12))
    assert chain is not None
    assert two.work(pipe, {}, 12).critical < chain.work(pipe, {}, 12).critical


def test_measured_speedups_are_between_those_that_were_measured() -> None:
    split = {"components": 1, "guidance": "split"}
    waves = {"components": 2, "schedule": "wavefront", "warmup": 1, "exact_tail": 0}
    waves |= {"guidance": "batched", "exact_mode": "split"}
    guided, fastest = speedup(split, 50)["sdxl"], speedup(waves, 50)["sdxl"]
    between = speedup({**waves, "warmup": 20}, 50)["sdxl"]
    assert 1.6 < guided < between < fastest < 2
    assert speedup({**waves, "warmup": 20, "exact_mode": "chain"}, 50)["sdxl"] < between
    assert "flux" not in speedup(split, 50)  # it has one condition only
