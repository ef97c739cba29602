"""What of the node for ComfyUI needs no ComfyUI: its inputs, and the workflows that come with it.

The rest is in tests/comfyui."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asyncdiff.errors import BatchError, DeviceError, InputError, PlanError
from asyncdiff.graph.batch import BatchSplit
from asyncdiff.graph.conditions import batched_inputs
from asyncdiff.graph.signature import parse

PACK = Path(__file__).parents[3] / "integrations" / "comfyui"
NAME = "asyncdiff_comfyui_node"


@pytest.fixture(scope="module")
def pack() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location(
        NAME, PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    yield module
    for name in [n for n in sys.modules if n.split(".")[0] == NAME]:
        del sys.modules[name]


@pytest.fixture
def config_of(pack: Any) -> Any:
    return importlib.import_module(f"{NAME}.settings").config_of


@pytest.fixture
def by_quality(pack: Any) -> Any:
    return importlib.import_module(f"{NAME}.settings").by_quality


def test_a_quality_has_all_devices(by_quality: Any) -> None:
    settings = by_quality("high", "cpu, cpu cpu", compile="off", compress="fp8")
    assert (settings.quality, len(settings.devices)) == ("high", 3)
    assert (settings.config.compile, settings.config.compress) == (False, "fp8")
    assert settings == by_quality("high", "cpu cpu cpu", compile="off", compress="fp8")
    with pytest.raises(InputError, match="quality='best'"):
        by_quality("best", "cpu, cpu")
    with pytest.raises(DeviceError, match="nothing to spread over cpu"):
        by_quality("high", "cpu")
    with pytest.raises(DeviceError, match="cuda:99"):
        by_quality("high", "cuda:98, cuda:99")


def test_devices_are_read(config_of: Any) -> None:
    cpu = torch.device("cpu")
    assert config_of("cpu, cpu").devices == (cpu, cpu)
    assert config_of("cpu cpu;cpu").components == 3
    assert config_of("cpu, cpu, cpu, cpu", guidance="split").components == 2
    assert config_of("cpu, cpu", components=1, guidance="split").components == 1


def test_all_gpus_are_taken(config_of: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [str(d) for d in config_of("").devices] == ["cuda:0", "cuda:1", "cuda:2"]
    assert config_of("", components=2).components == 2


def test_a_gpu_that_has_no_other_to_share_conditions_with(
    config_of: Any, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert len(config_of("", guidance="split").devices) == 2
    assert "cuda:2 is not used" in caplog.text
    assert config_of("", guidance="split", components=1).components == 1  # as it is asked for
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"devices": "cuda:0, cuda:99"}, DeviceError, "cuda:99"),
        ({"devices": "meta, meta"}, DeviceError, "ranks run on"),
        ({"devices": "cpu, cpu", "warmup": 0}, PlanError, "warmup"),
    ],
)
def test_the_node_itself_says_what_is_wrong(
    pack: Any, settings: Any, error: Any, said: str
) -> None:
    """Not the sampler behind it, which is where the model would first run."""
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Identity()))
    with pytest.raises(error, match=f"^AsyncDiff parallel: .*{said}"):
        pack.NODE_CLASS_MAPPINGS["AsyncDiffParallel"]().spread(model, **settings)


def test_what_is_no_model(pack: Any) -> None:
    with pytest.raises(InputError, match=r"^AsyncDiff parallel: model is no MODEL .*NoneType"):
        pack.NODE_CLASS_MAPPINGS["AsyncDiffParallel"]().spread(None, devices="cpu, cpu")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("take schedule='asyncdiff' or 'wavefront'", "take schedule asyncdiff or wavefront"),
        ("leave that to asyncdiff (compile=True)", "leave that to asyncdiff (compile on)"),
        (
            "guidance='split' of a batch, exact_mode='split' and schedule='pipeline' need",
            "guidance split of a batch and exact_mode split need",
        ),
        ("AsyncDiff parallel: bypass it", "bypass it"),
    ],
)
def test_messages_are_in_the_words_of_the_inputs(pack: Any, theirs: str, ours: str) -> None:
    words = importlib.import_module(f"{NAME}.words")
    with pytest.raises(PlanError) as raised, words.own_words():
        raise PlanError(theirs)
    assert str(raised.value) == f"AsyncDiff parallel: {ours}"


def test_a_batch_of_one_condition_speaks_of_the_sampler(pack: Any) -> None:
    words = importlib.import_module(f"{NAME}.words")
    module = torch.nn.Identity()
    call = parse(module, (torch.zeros(1, 4, 8, 8),), {})
    with pytest.raises(BatchError) as raised, words.own_words():
        batched_inputs(module, call, BatchSplit(conditions=2, count=1))
    assert "take a cfg above 1 in the sampler, or take guidance batched" in str(raised.value)


def test_what_crosses_is_compressed(config_of: Any) -> None:
    assert config_of("cpu, cpu").compress is None
    assert config_of("cpu, cpu", compress="auto").compress == "auto"


def test_a_schedule_of_exact_steps_needs_no_numbers_of_them(config_of: Any) -> None:
    assert config_of("cpu, cpu", schedule="sequence", exact_mode="split").exact_tail == 0


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"devices": "gpu one"}, InputError, "'gpu one' cannot be read"),
        ({"devices": "cpu"}, DeviceError, "nothing to spread over cpu"),
        ({"devices": "cpu, cpu", "components": 3}, DeviceError, "3 components take 3 devices, and"),
        ({"devices": "cpu, cpu, cpu", "components": 2}, DeviceError, r"there are 3 \(cpu, cpu, c"),
        ({"devices": "cpu, cpu, cpu", "guidance": "split", "components": 2}, DeviceError, "take 4"),
        ({"devices": "cpu, cpu", "warmup": 0}, PlanError, "warmup"),
        ({"devices": "cpu cpu cpu", "guidance": "split"}, DeviceError, "an even number of them"),
    ],
)
def test_what_is_wrong_is_said(config_of: Any, settings: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        config_of(**settings)


def test_asyncdiff_that_is_missing(pack: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "asyncdiff", None)
    with pytest.raises(RuntimeError, match="needs the Python package asyncdiff"):
        pack.NODE_CLASS_MAPPINGS["AsyncDiffParallel"]().spread(None)


@pytest.mark.parametrize("path", sorted((PACK / "workflows").glob("*.json")), ids=lambda p: p.stem)
def test_workflows(pack: Any, config_of: Any, by_quality: Any, path: Path) -> None:
    """Their settings are some that the node takes, in its order; their links lead somewhere."""
    flow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in flow["nodes"]}
    for number, source, output, target, place, kind in flow["links"]:
        assert number in nodes[source]["outputs"][output]["links"]
        assert (
            nodes[target]["inputs"][place] | {"link": number, "type": kind}
            == (nodes[target]["inputs"][place])
        )
    (node,) = (n for n in nodes.values() if n["type"] in pack.NODE_CLASS_MAPPINGS)
    inputs = pack.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
    names = [n for part in inputs.values() for n, kind in part.items() if kind[0] != "MODEL"]
    settings = dict(zip(names, node["widgets_values"], strict=True))
    read = config_of if node["type"] == "AsyncDiffParallel" else by_quality
    assert "cuda:0, cuda:1" in settings["devices"]
    read(**settings | {"devices": "cpu, cpu"})
