"""What of the node for ComfyUI needs no ComfyUI: its inputs, and the workflows that come with it.

The rest is in tests/comfyui."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncdiff.errors import DeviceError, InputError, PlanError

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
def test_workflows(pack: Any, config_of: Any, path: Path) -> None:
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
    config = config_of(**settings | {"devices": "cpu, cpu"})
    assert config.components == 2
