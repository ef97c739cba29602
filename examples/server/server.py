"""A server of pictures: one pipeline on several devices, behind HTTP.

    pip install 'asyncdiff[server]'
    python examples/server/server.py                                    # the shipped model, on CPUs
    python examples/server/server.py --model stabilityai/stable-diffusion-xl-base-1.0 \\
        --devices cuda:0,cuda:1 --size 1024x1024 --size 1344x768

    curl -s localhost:8000/pictures -d '{"prompt": "red heart"}' -H 'Content-Type: application/json'
    curl -s localhost:8000/pictures/ID           # queued, drawing (with the step), done, ...
    curl -s localhost:8000/pictures/ID/image > picture.png
    curl -s -X DELETE localhost:8000/pictures/ID                 # cancel, between two steps too
    curl -s localhost:8000/metrics                               # for Prometheus
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field

sys.path.insert(0, str(Path(__file__).parent))
from drawing import Drawing, Full, Job


class Asked(BaseModel):
    """What a client asks for."""

    model_config = ConfigDict(extra="forbid")  # a slip in a name would be drawn without it
    prompt: str = Field(min_length=1, max_length=2000)
    height: int | None = Field(None, gt=0)
    width: int | None = Field(None, gt=0)
    steps: int | None = Field(None, ge=1, le=1000)
    guidance_scale: float | None = Field(None, ge=0, allow_inf_nan=False)
    seed: int = Field(0, ge=-(2**63), lt=2**64)  # what torch takes


def told(job: Job) -> dict[str, Any]:
    """A picture, as clients are told of it."""
    return {
        "id": job.id,
        "status": job.status,
        "step": job.step,
        "seconds": job.seconds,
        "error": job.error,
    }


def make_app(drawing: Drawing, sizes: list[tuple[int, int]], steps: int) -> FastAPI:
    """The server around ``drawing``, which it starts and stops. Pictures have one of ``sizes``
    (height, width), the first one by default, and ``steps`` by default."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        drawing.start()
        try:
            yield
        finally:
            drawing.stop()

    app = FastAPI(title="asyncdiff", lifespan=lifespan)

    @app.exception_handler(RequestValidationError)
    def wrong(request: Request, error: RequestValidationError) -> Response:
        # Without what was sent: NaN and half a character are nothing that an answer can have.
        found = [{key: e[key] for key in ("type", "loc", "msg")} for e in error.errors()]
        return Response(json.dumps({"detail": found}), 422, media_type="application/json")

    def known(id: str) -> Job:
        job = drawing.job(id)
        if job is None:
            raise HTTPException(404, "there is no picture of this name, or not any more")
        return job

    @app.post("/pictures", status_code=202)
    def draw(asked: Asked) -> dict[str, Any]:
        if drawing.broken is not None:
            raise HTTPException(503, f"no picture can be drawn: {drawing.broken}")
        size = (asked.height or sizes[0][0], asked.width or sizes[0][1])
        if size not in sizes:  # another one would have everybody wait while it is prepared
            there = ", ".join(f"{h} x {w}" for h, w in sizes)
            raise HTTPException(422, f"{size[0]} x {size[1]} is not prepared: there are {there}")
        arguments: dict[str, Any] = {
            "prompt": asked.prompt,
            "height": size[0],
            "width": size[1],
            "num_inference_steps": asked.steps or steps,
        }
        if asked.guidance_scale is not None:
            arguments["guidance_scale"] = asked.guidance_scale
        try:
            return told(drawing.submit(arguments, asked.seed))
        except Full:
            raise HTTPException(503, "too many pictures wait", {"Retry-After": "10"}) from None

    @app.get("/pictures/{id}")
    def look(id: str) -> dict[str, Any]:
        return told(known(id))

    @app.get("/pictures/{id}/image")
    def image(id: str) -> Response:
        job = known(id)
        if job.status != "done":
            raise HTTPException(409, f"the picture is {job.status}")
        return Response(job.image, media_type="image/png")

    @app.delete("/pictures/{id}")
    def cancel(id: str) -> dict[str, Any]:
        job = known(id)
        drawing.cancel(job)
        return told(job)

    @app.get("/health")
    def health(response: Response) -> dict[str, Any]:
        if drawing.broken is not None:
            response.status_code = 503
            return {"status": "broken", "error": drawing.broken}
        if not drawing.ready.is_set():
            response.status_code = 503
            return {"status": "preparing", "doing": drawing.doing}
        return {"status": "ready", "settings": drawing.handle.settings}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response("".join(_metrics(drawing)), media_type="text/plain; version=0.0.4")

    return app


def _metrics(drawing: Drawing) -> list[str]:
    """Lines as Prometheus reads them."""
    lines = ["# TYPE asyncdiff_pictures_total counter\n"]
    for status in ("done", "cancelled", "failed", "refused"):
        count = drawing.counts[status]
        lines.append(f'asyncdiff_pictures_total{{status="{status}"}} {count}\n')
    lines.append(f"# TYPE asyncdiff_queued gauge\nasyncdiff_queued {drawing.queued}\n")
    ready = int(drawing.ready.is_set() and drawing.broken is None)
    lines.append(f"# TYPE asyncdiff_ready gauge\nasyncdiff_ready {ready}\n")
    if drawing.seconds:
        median = statistics.median(drawing.seconds)
        lines.append(f"# TYPE asyncdiff_seconds gauge\nasyncdiff_seconds {median:.4f}\n")
    return lines


def loader(model: str | None, dtype: str) -> Callable[[], Any]:
    """What loads a pipeline of diffusers; None: the model that comes with asyncdiff."""

    def load() -> Any:
        import torch

        if model is None:
            from asyncdiff import demo

            return demo.load()
        import diffusers

        pipe = diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype))
        return pipe.to("cuda") if torch.cuda.is_available() else pipe

    return load


def _size(text: str) -> tuple[int, int]:
    """Height and width, of a size as it is said: WIDTHxHEIGHT."""
    width, _, height = text.partition("x")
    return int(height), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or name for from_pretrained")
    parser.add_argument("--devices", help="cuda:0,cuda:1; all GPUs, or two shares of the CPU")
    parser.add_argument("--size", action="append", type=_size, help="WIDTHxHEIGHT, prepared ahead")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--quality", default="balanced")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    import uvicorn

    devices = args.devices.split(",") if args.devices else None
    sizes = args.size or [(64, 64) if args.model is None else (1024, 1024)]
    load = loader(args.model, args.dtype)
    drawing = Drawing(load, devices, sizes, args.steps, quality=args.quality)
    uvicorn.run(make_app(drawing, sizes, args.steps), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
