"""ComfyUI's own server without a browser: workflows go in and pictures come out over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("comfy", reason="COMFYUI names no folder of ComfyUI")
import torch
from comfyui.loading import PACK
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
#: Of latents of size one.
CLOSE = 1e-4
#: Seconds that ComfyUI has to start, to draw, and to end.
LIMIT = 120.0
#: Every step is exact.
EXACT = {
    "devices": "cpu, cpu",
    "components": 0,
    "schedule": "asyncdiff",
    "warmup": 1000,
    "exact_tail": 0,
    "guidance": "batched",
}


class Server:
    """ComfyUI's server, by its address, and what it writes below ``base``."""

    def __init__(self, base: Path, port: int) -> None:
        self.base, self._address = base, f"http://127.0.0.1:{port}"

    def ask(self, path: str, given: Any = None) -> Any:
        """The answer to a GET, or to a POST of what is given; both are JSON."""
        body = None if given is None else json.dumps(given).encode()
        request = urllib.request.Request(self._address + path, body)
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            return json.load(answer)

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """What the history says of a workflow, once it has ended."""
        id = self.ask("/prompt", {"prompt": workflow})["prompt_id"]
        end = time.monotonic() + LIMIT
        while not (history := self.ask(f"/history/{id}")):
            assert time.monotonic() < end
            time.sleep(0.05)
        return dict(history[id])

    def draw(self, workflow: dict[str, Any]) -> torch.Tensor:
        """The latents that a workflow saves."""
        history = self.run(workflow)
        assert history["status"]["status_str"] == "success", history["status"]
        (saved,) = history["outputs"]["save"]["latents"]
        path = self.base / saved["type"] / saved["subfolder"] / saved["filename"]
        return load_file(path)["latent_tensor"]

    def error(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """What the interface shows of a workflow that fails."""
        status = self.run(workflow)["status"]
        assert status["status_str"] == "error"
        (error,) = (what for event, what in status["messages"] if event == "execution_error")
        return dict(error)


def workflow(**settings: Any) -> dict[str, Any]:
    """One that draws with a tiny model and saves latents; with settings, through the node."""
    sampled = {
        "model": ["spread" if settings else "tiny", 0],
        "positive": ["tiny", 1],
        "negative": ["tiny", 2],
        "latent_image": ["empty", 0],
        "seed": 1,
        "steps": 6,
        "cfg": 5.0,
        "sampler_name": "dpmpp_2m",
        "scheduler": "karras",
        "denoise": 1.0,
    }
    nodes = {
        "tiny": ("TinyModel", {}),
        "empty": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "sample": ("KSampler", sampled),
        "save": ("SaveLatent", {"samples": ["sample", 0], "filename_prefix": "latents/drawn"}),
    }
    if settings:
        nodes["spread"] = ("AsyncDiffParallel", {"model": ["tiny", 0], **settings})
    return {id: {"class_type": kind, "inputs": given} for id, (kind, given) in nodes.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    for name, pack in (("asyncdiff", PACK), ("tiny", HERE / "tiny_pack")):
        (base / "custom_nodes").mkdir(exist_ok=True)
        (base / "custom_nodes" / name).symlink_to(pack)
    (base / "interface").mkdir()
    (base / "interface" / "index.html").touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / "serve.py"), os.environ["COMFYUI"], "--cpu"]
    command += ["--base-directory", str(base), "--front-end-root", str(base / "interface")]
    command += ["--port", str(port), "--disable-api-nodes", "--use-pytorch-cross-attention"]
    command += ["--database-url", "sqlite:///:memory:"]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = base / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": path}
        )
    try:
        served = Server(base, port)
        _until_it_answers(served, process, log)
        yield served
        process.send_signal(signal.SIGINT)
        process.wait(LIMIT)  # what ranks hold does not keep it
        assert "Stopped server" in log.read_text()
    finally:
        process.kill()
        process.wait()


def _until_it_answers(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + LIMIT
    while True:
        try:
            server.ask("/prompt")
            return
        except urllib.error.URLError:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)


def test_the_nodes_are_on_the_menu(server: Server) -> None:
    for name, shown, inputs in (
        ("AsyncDiffParallel", "AsyncDiff parallel (by hand)", {*EXACT}),
        ("AsyncDiffByQuality", "AsyncDiff parallel", {"quality", "devices"}),
    ):
        told = server.ask(f"/object_info/{name}")[name]
        assert told["display_name"] == shown
        assert set(told["input"]["required"]) == {"model", *inputs}


def test_a_workflow_draws_the_same_by_quality(server: Server) -> None:
    plain, flow = server.draw(workflow()), workflow(**EXACT)
    given = {"model": ["tiny", 0], "quality": "exact", "devices": "cpu, cpu"}
    flow["spread"] = {"class_type": "AsyncDiffByQuality", "inputs": given}
    assert (plain - server.draw(flow)).abs().max() <= CLOSE * plain.std()


@pytest.mark.parametrize(
    "settings",
    [{}, {"schedule": "wavefront"}, {"devices": "cpu cpu cpu cpu", "guidance": "split"}],
    ids=str,
)
def test_a_workflow_draws_the_same_through_the_node(server: Server, settings: Any) -> None:
    plain = server.draw(workflow())
    assert plain.isfinite().all() and plain.std() > 0.1
    split = server.draw(workflow(**EXACT | settings))
    assert (plain - split).abs().max() <= CLOSE * plain.std()


def test_asynchronous_steps_are_close(server: Server) -> None:
    """So it is the node that draws."""
    plain, late = server.draw(workflow()), server.draw(workflow(**EXACT | {"warmup": 3}))
    assert 1e-4 < (plain - late).norm() / plain.norm() < 0.5


def test_an_error_of_the_node_is_shown(server: Server) -> None:
    error = server.error(workflow(**EXACT | {"devices": "cpu"}))
    assert error["node_type"] == "AsyncDiffParallel"
    assert error["exception_message"].startswith("AsyncDiff parallel: there is nothing to spread")
    error = server.error(workflow(**EXACT | {"schedule": "sequence"}))
    assert error["node_type"] == "KSampler"  # which alone knows the model's sizes
    assert error["exception_message"].startswith("AsyncDiff parallel: ")
    assert "take schedule asyncdiff or wavefront" in error["exception_message"]
    assert server.draw(workflow(**EXACT)).isfinite().all()  # the next one is drawn
