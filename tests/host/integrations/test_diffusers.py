"""The drop-in: pipelines used unchanged, of every kind and with every sampler."""

from __future__ import annotations

import copy
import threading
from typing import Any

import diffusers
import pytest
import reference
import torch
from tiny_pipelines import draw, tiny_flux, tiny_sd, tiny_sd3

import asyncdiff
from asyncdiff import InputError

CALL = tiny_sd()[1] | {"num_inference_steps": 10}
XL = reference.SMALL_XL
SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]


def pipeline() -> Any:
    pipe = tiny_sd()[0]
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return pipe


def plain_result(**options: Any) -> torch.Tensor:
    return draw(pipeline(), CALL, **options)


@pytest.mark.parametrize(("components", "stride"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 3)])
def test_all_steps_exact_is_the_plain_pipeline(components: int, stride: int) -> None:
    pipe = pipeline()
    handle = asyncdiff.parallelize(
        pipe,
        devices=["cpu"] * (components + stride - 1),
        components=components,
        stride=stride,
        warmup=4,
        split="estimate",
    )
    got = draw(pipe, CALL, num_inference_steps=4)
    assert reference.distance(got, plain_result(num_inference_steps=4)) < 1e-5
    handle.restore()


def test_one_component_is_the_plain_pipeline() -> None:
    pipe = pipeline()
    handle = asyncdiff.parallelize(pipe, devices=["cpu"], components=1)
    assert reference.distance(draw(pipe, CALL), plain_result()) < 1e-5
    handle.restore()


@pytest.fixture(scope="module")
def shared() -> Any:
    """One parallelised pipeline for many schedulers: it is prepared once."""
    pipe = pipeline()
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 3, stride=2, warmup=6, split="estimate")
    yield pipe
    handle.restore()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_any_scheduler(shared: Any, name: str) -> None:
    """All exact equals the plain pipeline; a longer, asynchronous run stays near it."""
    config = pipeline().scheduler.config
    plain = pipeline()
    distances = []
    for steps in (6, 12):
        results = []
        for pipe in (plain, shared):
            # PNDM takes its second step twice.
            taken, options = steps, {}
            if name == "PNDMScheduler":
                taken, options = steps - 1, {"skip_prk_steps": True}
            pipe.scheduler = getattr(diffusers, name).from_config(config, **options)
            generator = torch.Generator().manual_seed(3)
            results.append(draw(pipe, CALL, num_inference_steps=taken, generator=generator))
        distances.append(reference.distance(*results))
    assert distances[0] < 1e-4
    assert 1e-4 < distances[1] < 1.0


def test_pipeline_and_denoiser_stay_what_they_are() -> None:
    pipe = reference.pipeline(XL)
    unet, config = pipe.unet, copy.deepcopy(dict(pipe.unet.config))
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, split=XL["split"])
    assert pipe.unet is unet and isinstance(unet, diffusers.UNet2DConditionModel)
    assert type(unet).__name__ == "UNet2DConditionModel"
    assert type(pipe).__name__ == "StableDiffusionXLPipeline"
    assert dict(unet.config) == config and unet.dtype == torch.float32
    assert pipe.to("cpu") is pipe
    handle.restore()
    assert type(unet) is diffusers.UNet2DConditionModel
    assert type(pipe) is diffusers.StableDiffusionXLPipeline


def test_without_guidance_and_with_other_sizes() -> None:
    pipe = pipeline()
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=3, split="estimate")
    for options in (
        {"guidance_scale": 1.0},
        {"height": 64, "width": 192, "latents": torch.randn(1, 4, 8, 24)},
        {},
    ):
        options["num_inference_steps"] = 3
        got = draw(pipe, CALL, **options)
        assert reference.distance(got, plain_result(**options)) < 1e-5
    handle.restore()


def test_a_callback_that_raises_and_one_that_interrupts() -> None:
    pipe = pipeline()
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, components=2, split="estimate")
    want = draw(pipe, CALL)

    def fail(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
        if step == 4:
            raise KeyError("enough")
        return kwargs

    def stop(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
        pipe._interrupt = step >= 4
        return kwargs

    with pytest.raises(KeyError):
        draw(pipe, CALL, callback_on_step_end=fail)
    assert torch.equal(draw(pipe, CALL), want)
    draw(pipe, CALL, callback_on_step_end=stop)
    pipe._interrupt = False
    assert torch.equal(draw(pipe, CALL), want)
    handle.restore()


def test_concurrent_callers_take_turns() -> None:
    pipe = pipeline()
    handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, components=2, split="estimate")
    want = draw(pipe, CALL)
    got: list[Any] = [None] * 3

    def work(i: int) -> None:
        got[i] = draw(pipe, CALL)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert all(g is not None and torch.equal(g, want) for g in got)
    handle.restore()


def tiny_vae() -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    ).eval()


@pytest.mark.parametrize("name", ["Img2Img", "Inpaint"])
def test_image_to_image_starts_in_the_middle(name: str) -> None:
    base = pipeline()
    parts = base.components | {"vae": tiny_vae()}
    pipe = getattr(diffusers, f"StableDiffusion{name}Pipeline")(
        **parts, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in CALL.items() if k.endswith("embeds")}
    call |= {"image": torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))}
    call |= {"strength": 0.6, "num_inference_steps": 10, "guidance_scale": 4.0}
    call |= {"output_type": "latent"}
    if name == "Inpaint":
        call |= {"mask_image": (torch.arange(128) > 50).float().expand(1, 1, 128, 128)}
        call |= {"height": 128, "width": 128}

    def run() -> torch.Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(2)).images

    want = run()
    for warmup, near in ((6, 1e-5), (1, 1.0)):
        handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, warmup=warmup, split="estimate")
        assert reference.distance(run(), want) < near
        assert handle.report().steps == 6
        handle.restore()


@pytest.mark.parametrize("make", [tiny_flux, tiny_sd3])
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_transformers(make: Any, stride: int) -> None:
    """FLUX passes t/1000, SD3 t for each picture; with a stride, later times are made like that."""
    pipe, call = make()
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        return pipe(**call, num_inference_steps=8, generator=generator, output_type="latent").images

    want = run()
    for warmup, near in ((8, 1e-5), (2, 1.0)):
        handle = asyncdiff.parallelize(
            pipe, devices=["cpu"] * (1 + stride), stride=stride, warmup=warmup, split="estimate"
        )
        assert reference.distance(run(), want) < near
        handle.restore()


@pytest.mark.parametrize(
    ("devices", "settings", "near"),
    [
        (2, {"components": 1, "guidance": "split"}, 1e-5),
        (4, {"components": 2, "warmup": 6, "guidance": "split"}, 1e-5),
        (2, {"components": 2, "warmup": 2}, 0.5),
        (3, {"components": 2, "warmup": 1, "stride": 2}, 1.0),
        (2, {}, 1e-5),  # so few steps are exact
        *(
            pytest.param(2, settings, near, marks=pytest.mark.slow)
            for settings, near in (
                ({"components": 2, "warmup": 6}, 1e-5),
                ({"components": 2, "warmup": 6, "exact_mode": "split"}, 1e-5),
                ({"components": 2, "warmup": 2, "schedule": "wavefront"}, 0.5),
                ({"quality": "exact"}, 1e-5),
            )
        ),
    ],
    ids=str,
)
def test_flux_with_two_calls_a_step(devices: int, settings: dict[str, Any], near: float) -> None:
    pipe, call = tiny_flux()
    pipe.set_progress_bar_config(disable=True)
    negative = {f"negative_{k}": v for k, v in call.items() if k.endswith("embeds")}
    other = negative["negative_prompt_embeds"] * -0.5
    guided = call | negative | {"negative_prompt_embeds": other, "true_cfg_scale": 4.0}
    options = {"num_inference_steps": 6, "output_type": "latent"}

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(2)
        return pipe(**guided, **options, generator=generator).images

    want = run()
    on = ["cpu"] * devices if "components" in settings else ["cpu"] * 2
    with asyncdiff.parallelize(pipe, devices=on, split="estimate", **settings) as handle:
        for _ in range(2):
            assert reference.distance(run(), want) < near
        report = handle.report()
        assert report.branches == 2 and report.steps == 6
    assert torch.equal(run(), want)


MORE_SAMPLERS = (
    *("KDPM2DiscreteScheduler", "DEISMultistepScheduler", "DDPMScheduler", "LCMScheduler"),
    *("DPMSolverSinglestepScheduler", "SASolverScheduler", "UniPCMultistepScheduler"),
)


@pytest.mark.parametrize(
    "name",
    [
        "PNDMScheduler",
        *(
            pytest.param(f"{name}DiscreteScheduler", marks=pytest.mark.slow)
            for name in ("Heun", "KDPM2Ancestral")
        ),
        *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_SAMPLERS),
    ],
)
def test_any_sampler(name: str) -> None:
    """Also those that ask for several predictions a step, and whose timesteps repeat."""
    pipe, call = tiny_sd()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)

    def run() -> torch.Tensor:
        return draw(pipe, call, num_inference_steps=6)

    want = run()
    for settings, near in (
        ({"components": 2, "warmup": 40}, 1e-5),
        ({"components": 2, "warmup": 2}, 2.0),
        ({"components": 2, "warmup": 1, "stride": 2}, 2.0),
        ({"quality": "exact"}, 1e-5),
    ):
        count = settings.get("stride", 1) + 1  # type: ignore[operator]
        with asyncdiff.parallelize(
            pipe,
            devices=["cpu"] * count,
            split="estimate",
            **settings,  # type: ignore[arg-type]
        ) as handle:
            assert reference.distance(run(), want) < near
            assert handle.report().steps == len(pipe.scheduler.timesteps)


def video_denoisers() -> Any:
    torch.manual_seed(0)
    blocks = ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")
    svd = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=blocks,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=(2, 4),
        cross_attention_dim=32,
        num_frames=3,
        layers_per_block=1,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    animate = diffusers.UNetMotionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=32,
        num_attention_heads=4,
        motion_num_attention_heads=4,
        layers_per_block=1,
    )
    return [svd, animate]


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_video_denoisers(index: int) -> None:
    """Stable Video Diffusion's and AnimateDiff's structure, exact step for step."""
    from asyncdiff.graph.example_inputs import example_inputs

    module = video_denoisers()[index].eval().requires_grad_(False)
    kwargs = example_inputs(module, frames=3)
    times = torch.tensor([900.0, 600.0, 300.0])
    denoiser = asyncdiff.AsyncDenoiser(
        module, example_kwargs=kwargs, devices=["cpu"] * 2, warmup=3, split="estimate"
    )
    with denoiser.generation(times):
        for t in times:
            call = kwargs | {"timestep": t.to(kwargs["timestep"].dtype)}
            got, want = denoiser(**call)[0], module(**call)[0]
            assert reference.distance(got, want) < 1e-5
    denoiser.close()


def test_plan_partition_without_running() -> None:
    pipe = pipeline()
    from asyncdiff.integrations.diffusers.pipeline import plan_partition

    parts = plan_partition(pipe, 2, height=64, width=64)
    assert "measured on CPU" in str(parts.report())
    pipe.unet.to("meta")
    parts = plan_partition(pipe, 3, height=64, width=64)
    assert "estimated" in str(parts.report()) and len(parts.components) == 3
    with pytest.raises(InputError, match="no example inputs"):
        plan_partition(type("Pipe", (), {"unet": torch.nn.Linear(1, 1)})(), 2)
