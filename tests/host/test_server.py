"""The example of a server: queue, sizes prepared ahead, cancelling between steps, metrics."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from export_cache import uncached
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
from fastapi.testclient import TestClient

FOLDER = Path(__file__).parents[2] / "examples" / "server"
SIZE = (64, 64)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import server

    return server


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Pictures are drawn while it is set."""
    event = threading.Event()
    event.set()
    yield event
    event.set()


@pytest.fixture
def client(server: Any, gate: threading.Event) -> Iterator[TestClient]:
    def load() -> Any:
        pipe = server.loader(None, "float32")()
        pipe.set_progress_bar_config(disable=True)
        step = pipe.scheduler.step

        def gated(*args: Any, **given: Any) -> Any:
            assert gate.wait(60)
            return step(*args, **given)

        pipe.scheduler.step = gated
        return pipe

    drawing = sys.modules["drawing"].Drawing(load, ["cpu"] * 2, [SIZE], 2, waiting=2)
    with TestClient(server.make_app(drawing, [SIZE], 2)) as client:
        _until(lambda: client.get("/health").status_code == 200)
        yield client
    assert not drawing._thread.is_alive()


def _until(done: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def _draw(client: TestClient, **asked: Any) -> str:
    answer = client.post("/pictures", json={"prompt": "red heart", **asked})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def _ended(client: TestClient, id: str) -> dict[str, Any]:
    _until(lambda: client.get(f"/pictures/{id}").json()["status"] not in ("queued", "drawing"))
    return dict(client.get(f"/pictures/{id}").json())


@pytest.mark.slow
def test_pictures(client: TestClient, gate: threading.Event) -> None:
    ids = [_draw(client, seed=seed) for seed in (1, 2)]
    ended = [_ended(client, id) for id in ids]
    assert [e["status"] for e in ended] == ["done"] * 2 and ended[0]["step"] == 2
    images = [client.get(f"/pictures/{id}/image") for id in ids]
    assert all(Image.open(io.BytesIO(i.content)).size == SIZE for i in images)
    assert images[0].content != images[1].content
    again = _draw(client, seed=1)
    assert _ended(client, again)["status"] == "done"
    assert client.get(f"/pictures/{again}/image").content == images[0].content

    gate.clear()  # one is drawn, two wait, a fourth is refused
    drawn = _draw(client, steps=5)
    _until(lambda: client.get(f"/pictures/{drawn}").json()["status"] == "drawing")
    waiting = [_draw(client) for _ in range(2)]
    full = client.post("/pictures", json={"prompt": "red heart"})
    assert full.status_code == 503 and "Retry-After" in full.headers
    assert client.get(f"/pictures/{drawn}/image").status_code == 409
    for id in (drawn, waiting[0]):
        assert client.delete(f"/pictures/{id}").status_code == 200
    gate.set()
    assert _ended(client, drawn)["status"] == "cancelled" and _ended(client, drawn)["step"] < 5
    assert _ended(client, waiting[0])["status"] == "cancelled"
    assert _ended(client, waiting[1])["status"] == "done"

    other = client.post("/pictures", json={"prompt": "red heart", "height": 32})
    assert other.status_code == 422 and "64 x 64" in other.json()["detail"]
    for wrong in ({"prompt": ""}, {"prompt": "a", "seed": 2**64}, {"prompt": "a", "steps": 0}):
        assert client.post("/pictures", json=wrong).status_code == 422
    assert client.get("/pictures/nothing").status_code == 404
    failed = _draw(client, guidance_scale=0.0, prompt="no words that it knows: xyzzy")
    assert _ended(client, failed)["status"] in ("failed", "done")
    metrics = client.get("/metrics").text
    assert 'asyncdiff_pictures_total{status="cancelled"} 2' in metrics
    assert 'asyncdiff_pictures_total{status="refused"} 1' in metrics
    assert "asyncdiff_ready 1" in metrics and "asyncdiff_seconds " in metrics


def test_a_model_that_cannot_be_loaded(server: Any) -> None:
    def load() -> Any:
        raise OSError("there is no such model")

    drawing = sys.modules["drawing"].Drawing(load, None, [SIZE], 2)
    with TestClient(server.make_app(drawing, [SIZE], 2)) as client:
        _until(lambda: client.get("/health").json()["status"] == "broken")
        answer = client.post("/pictures", json={"prompt": "red heart"})
        assert answer.status_code == 503 and "no such model" in answer.json()["detail"]
        assert "asyncdiff_ready 0" in client.get("/metrics").text


def test_it_stops_though_pictures_wait_that_nobody_draws(server: Any) -> None:
    begin, module = threading.Event(), sys.modules["drawing"]

    def load() -> Any:
        assert begin.wait(60)
        raise OSError("there is no such model")

    drawing = module.Drawing(load, None, [SIZE], 2, waiting=2)
    drawing.start()
    failed, cancelled = (drawing.submit({}, 0) for _ in range(2))
    drawing.cancel(cancelled)  # at once, though nothing is drawn yet
    assert (failed.status, cancelled.status) == ("queued", "cancelled")
    begin.set()
    assert failed.ended.wait(60) and failed.status == "failed"
    drawing._thread.join(60)
    with pytest.raises(module.Full):  # who asks now would wait for ever
        drawing.submit({}, 0)
    stopping = threading.Thread(target=drawing.stop, daemon=True)
    stopping.start()
    stopping.join(10)
    assert not stopping.is_alive() and drawing.counts["cancelled"] == 1


@pytest.fixture
def idle(server: Any) -> Iterator[TestClient]:
    """A server that takes pictures, two at most, and draws none yet."""
    begin = threading.Event()

    def load() -> Any:
        assert begin.wait(60)
        raise OSError("there is no such model")

    drawing = sys.modules["drawing"].Drawing(load, None, [SIZE], 2, waiting=2)
    with TestClient(server.make_app(drawing, [SIZE], 2), raise_server_exceptions=False) as client:
        yield client
        begin.set()


def test_cancelled_pictures_leave_the_queue(idle: TestClient) -> None:
    ids = [_draw(idle) for _ in range(2)]
    assert idle.post("/pictures", json={"prompt": "red heart"}).status_code == 503
    for id in ids:
        assert idle.delete(f"/pictures/{id}").json()["status"] == "cancelled"
    assert "asyncdiff_queued 0" in idle.get("/metrics").text
    _draw(idle)
    assert "asyncdiff_queued 1" in idle.get("/metrics").text


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ('"prompt": "a", "guidance_scale": 1e999', "finite"),
        ('"prompt": "a", "guidance_scale": NaN', "finite"),
        ('"prompt": "\\ud800"', "unicode"),
        ('"prompt": "a", "num_inference_steps": 3', "num_inference_steps"),
        ('"prompt": "a", "\\ud800": 3', "unicode"),
    ],
)
def test_what_cannot_be_drawn_is_refused(idle: TestClient, sent: str, said: str) -> None:
    answer = idle.post(
        "/pictures", content="{" + sent + "}", headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422 and said in answer.text


def test_stopping_does_not_wait_for_loading(server: Any) -> None:
    begin, module = threading.Event(), sys.modules["drawing"]
    drawing = module.Drawing(lambda: begin.wait(60), None, [SIZE], 2)
    drawing.start()
    job = drawing.submit({}, 0)
    drawing.stop()
    assert job.status == "cancelled" and drawing._thread.is_alive()
    begin.set()
    drawing._thread.join(10)
    assert not drawing._thread.is_alive() and drawing.broken == "the server stops"


def test_stopping_ends_a_preparation(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(sys.modules["drawing"].Drawing):  # type: ignore[name-defined]
        """Told to stop as soon as it exports."""

        def _told(self, what: str, done: int, total: int) -> None:
            if what.startswith("exporting"):
                self._stopping.set()
            super()._told(what, done, total)

    uncached(monkeypatch)
    drawing = Stopped(server.loader(None, "float32"), ["cpu"] * 2, [SIZE], 20)
    drawing.start()
    drawing._thread.join(60)
    assert not drawing._thread.is_alive() and drawing.broken == "the server stops"
    assert drawing.handle is None and drawing.doing.startswith("exporting")


def test_ended_pictures_are_kept_as_png(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["drawing"]
    handle = SimpleNamespace(prepare=lambda **_: [])
    monkeypatch.setattr(
        module.asyncdiff, "parallelize", lambda *_, **__: contextlib.nullcontext(handle)
    )
    drawn = Image.new("RGB", SIZE, "red")
    go = threading.Event()

    def pipe(**_: Any) -> Any:
        assert go.wait(60)
        return SimpleNamespace(images=[drawn])

    drawing = module.Drawing(lambda: pipe, None, [SIZE], 2, waiting=4, kept=2)
    drawing.start()
    first = drawing.submit({}, 0)
    _until(lambda: first.status == "drawing")
    for _ in range(5):  # whoever ends meanwhile has nobody forgotten that is not drawn yet
        drawing.cancel(drawing.submit({}, 0))
    assert drawing.job(first.id) is first and len(drawing._jobs) == 3
    go.set()
    assert first.ended.wait(60) and isinstance(first.image, bytes)
    assert Image.open(io.BytesIO(first.image)).getpixel((0, 0)) == (255, 0, 0)
    drawing.stop()
