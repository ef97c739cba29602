"""The shipped emoji model: loads without network, keeps to diffusers' ways, really draws."""

from __future__ import annotations

import builtins
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asyncdiff import demo
from asyncdiff.demo import model as demo_model
from asyncdiff.demo import weights as eight_bit
from asyncdiff.demo.words import Vocabulary
from asyncdiff.errors import InputError

# Mean colour of the middle 16 x 16 pixels of the training pictures.
REFERENCE = {
    "red heart": (0.96, 0.26, 0.21),
    "green circle": (0.49, 0.7, 0.26),
    "blue heart": (0.1, 0.46, 0.82),
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = demo_model.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shipped_files_are_small_and_readable() -> None:
    with resources.as_file(resources.files("asyncdiff.demo")) as folder:
        files = [f for f in Path(folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    assert {"model.safetensors", "config.json"} <= {f.name for f in files}
    assert sum(f.stat().st_size for f in files) <= 8 * 2**20


def test_weights_of_the_repository_are_few() -> None:
    root = Path(__file__).parents[3]
    kept = [f for d in ("python", "benchmarks", "tests") for f in (root / d).rglob("*.safetensors")]
    assert kept
    assert sum(f.stat().st_size for f in kept) <= 32 * 2**20


def test_weights_in_eight_bits(tmp_path: Path) -> None:
    given = {
        "matrix": torch.randn(6, 5) * torch.logspace(-3, 1, 6)[:, None],
        "convolution": torch.randn(4, 3, 2, 2).to(torch.bfloat16),
        "vector": torch.randn(7),
        "nothing": torch.zeros(2, 3),
    }
    eight_bit.save(given, tmp_path / "w.safetensors")
    kept = eight_bit.load(tmp_path / "w.safetensors")
    assert kept.keys() == given.keys()
    for name, w in given.items():
        assert kept[name].dtype == torch.float32 and kept[name].shape == w.shape
        off = (kept[name] - w.float()).flatten(1 if w.dim() > 1 else 0).abs()
        largest = w.float().flatten(1 if w.dim() > 1 else 0).abs().amax(-1, keepdim=True)
        # Half a step of 127, and float16's rounding of the scale.
        assert (off <= largest * (0.5 / 127 + 2**-10)).all(), name


def test_known_prompts_are_in_the_vocabulary(pipe: Any) -> None:
    prompts = demo_model.known_prompts()
    assert len(prompts) >= 40
    assert len(set(prompts)) == len(prompts)
    assert set(prompts) <= set(demo_model.captions())
    assert not [p for p in prompts if pipe.tokenizer.unknown(p)]


def test_structure_is_stable_diffusions(pipe: Any) -> None:
    assert type(pipe.unet).__name__ == "UNet2DConditionModel"
    assert "CrossAttnDownBlock2D" in pipe.unet.config.down_block_types
    assert set(pipe.components) == {"unet", "scheduler", "word_encoder"}
    assert sum(p.numel() for p in pipe.unet.parameters()) < 8e6


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dpm", "euler")]


@pytest.mark.parametrize("scheduler", ["ddim", *_SLOW])
def test_draws_what_the_prompt_says(scheduler: str) -> None:
    pipe = demo_model.load(scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    prompts = list(REFERENCE)
    images = pipe(prompts, num_inference_steps=12, generator=seeded(), output_type="np").images
    assert images.shape == (len(prompts), 64, 64, 3)
    assert images.min() >= 0
    assert images.max() <= 1
    for prompt, image in zip(prompts, images, strict=True):
        middle = image[24:40, 24:40].mean((0, 1))
        assert np.abs(middle - REFERENCE[prompt]).max() < 0.05, (prompt, middle)
        corners = np.stack([image[:4, :4], image[:4, -4:], image[-4:, :4], image[-4:, -4:]])
        assert corners.mean() > 0.97, prompt  # a white page
        # Neighbouring pixels of a picture are alike; those of noise are not.
        assert np.abs(np.diff(image, axis=0)).mean() < 0.05, prompt


def test_saved_to_a_folder_and_loaded(pipe: Any, tmp_path: Path) -> None:
    folder = tmp_path / "emoji"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.save_pretrained(folder)
        again = demo.EmojiPipeline.from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    assert demo_model.is_saved(folder) and not demo_model.is_saved(tmp_path)
    assert again.tokenizer.words == pipe.tokenizer.words
    assert type(again.scheduler) is type(pipe.scheduler)
    call = {"num_inference_steps": 2, "output_type": "latent"}
    one, two = (p("red heart", generator=seeded(), **call).images for p in (pipe, again))
    assert torch.equal(one, two)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_command_line_loads_it_with_any_sampler(tmp_path: Path) -> None:
    from asyncdiff.cli.subject import Model

    demo_model.load().save_pretrained(tmp_path / "emoji")
    model = Model(model=str(tmp_path / "emoji"), dtype="float16", load=["local_files_only=true"])
    pipe = model.pipeline("cpu", "unipc")
    assert type(pipe).__name__ == "EmojiPipeline" and pipe.unet.dtype == torch.float16
    assert type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
    assert type(Model(demo=True).pipeline("cpu", "LMSDiscreteScheduler").scheduler).__name__ == (
        "LMSDiscreteScheduler"
    )
    with pytest.raises(InputError, match="HeunDiscreteScheduler does not suit this model"):
        Model(demo=True).pipeline("cpu", "HeunDiscreteScheduler")
    with pytest.raises(InputError, match="cannot load"):
        Model(model=str(tmp_path / "emoji"), load=["unet=3"]).pipeline("cpu")


def test_a_seed_decides_the_picture(pipe: Any) -> None:
    def draw(seed: int) -> Any:
        return pipe(
            "red heart", num_inference_steps=3, generator=seeded(seed), output_type="latent"
        ).images

    first = draw(1)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    shape = pipe.prepare_latents(1, 64, 64).shape
    assert first.shape == shape
    latents = torch.randn(shape, generator=seeded(1))
    given = pipe("red heart", num_inference_steps=3, latents=latents, output_type="latent").images
    assert torch.equal(given, first)


def test_output_types_sizes_and_tuples(pipe: Any) -> None:
    images = pipe(["red heart", "blue heart"], num_inference_steps=1).images
    assert [i.size for i in images] == [(64, 64)] * 2
    assert images[0].mode == "RGB"
    assert pipe(
        "star", num_inference_steps=1, height=32, width=96, output_type="pt"
    ).images.shape == (1, 3, 32, 96)
    assert pipe("star", num_inference_steps=1, return_dict=False)[0][0].size == (64, 64)


@pytest.mark.parametrize(("guidance", "batch"), [(5.0, 2), (1.0, 1)])
def test_unet_may_be_replaced_and_is_called_once_a_step(guidance: float, batch: int) -> None:
    pipe = demo_model.load()
    pipe.set_progress_bar_config(disable=True)
    plain = pipe("red heart", 4, guidance, seeded(), output_type="latent").images
    calls: list[tuple[int, ...]] = []

    class Other(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.config = inner, inner.config

        def forward(
            self, sample: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool = True
        ) -> Any:
            calls.append(tuple(sample.shape))
            return self.inner(sample, timestep, encoder_hidden_states, return_dict=return_dict)

    pipe.unet = Other(pipe.unet)
    seen: list[int] = []

    def watch(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return tensors

    again = pipe(
        "red heart", 4, guidance, seeded(), output_type="latent", callback_on_step_end=watch
    ).images
    assert torch.equal(plain, again)
    assert len(calls) == 4
    assert {shape[0] for shape in calls} == {batch}
    assert seen == [0, 1, 2, 3]


def test_mistakes_are_explained(pipe: Any) -> None:
    with pytest.raises(InputError, match=r"'hart' \(near: .*heart.*known_prompts"):
        pipe("red hart")
    with pytest.raises(InputError, match="at most 15 words"):
        pipe("face " * 16)
    with pytest.raises(InputError, match="multiples of"):
        pipe("red heart", height=63)
    with pytest.raises(InputError, match="at least 1"):
        pipe("red heart", num_inference_steps=0)
    with pytest.raises(InputError, match="output_type"):
        pipe("red heart", output_type="jpeg")
    with pytest.raises(InputError, match="latents have the shape"):
        pipe("red heart", latents=torch.zeros(1, 3, 64, 64))
    with pytest.raises(InputError, match="non-empty list"):
        pipe([])
    with pytest.raises(InputError, match="choose one of ddim, dpm, euler"):
        demo_model.load(scheduler="pndm")


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InputError, match=r"asyncdiff\[demo\]"):
        demo_model.load()


def test_vocabulary_rows() -> None:
    vocabulary = Vocabulary(["heart", "red"], length=4)
    assert vocabulary(["Red heart!", ""]).tolist() == [[1, 3, 2, 0], [1, 0, 0, 0]]
    assert len(vocabulary) == 4
    assert vocabulary.unknown("red house") == ["house"]
