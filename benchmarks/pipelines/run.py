"""Try asyncdiff on every pipeline of diffusers, by the tiny models of diffusers' own tests.

    python benchmarks/pipelines/run.py DIFFUSERS          # a clone of diffusers; about an hour
    python benchmarks/pipelines/run.py DIFFUSERS --only wan flux       # again, of these alone

Each pipeline is built as its test builds it (texts are encoded by stand-ins), runs plainly, with
every step exact on two components, with all but the first step asynchronous, and plainly again once
it was restored. Written to ``--out``, pipeline by pipeline: the largest difference over the largest
value, the calls of the denoiser in a step, or why it was refused, or could not be built. The tests
need some packages more, such as parameterized and requests_mock.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results_file

#: Bytes that a pipeline may take, and seconds.
_MOST, _PATIENCE = 12 << 30, 400
_STEPS = 4


def classes(tests: Path, only: list[str]) -> Iterator[tuple[str, str]]:
    """Names of test modules, and of the classes in them that build a pipeline."""
    for path in sorted(tests.rglob("test_*.py")):
        name = ".".join(("tests.pipelines", *path.relative_to(tests).with_suffix("").parts))
        if not _chosen(name, only):
            continue
        try:
            module = importlib.import_module(name)
        except BaseException as e:
            yield name, f"! {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
            continue
        seen = set()
        for cls, made in vars(module).items():
            if not inspect.isclass(made) or made.__module__ != name:
                continue
            if isinstance(getattr(made, "pipeline_class", None), type) and (
                "get_dummy_components" in dir(made) and "test" in cls.lower()
            ):
                if made.pipeline_class not in seen:
                    yield name, cls
                seen.add(made.pipeline_class)


def _chosen(module: str, only: list[str]) -> bool:
    return not only or any(word in module for word in only)


def inputs_of(test: Any) -> dict[str, Any]:
    takes = inspect.signature(test.get_dummy_inputs).parameters
    found: dict[str, Any] = (
        test.get_dummy_inputs("cpu") if "device" in takes else (test.get_dummy_inputs())
    )
    if "num_inference_steps" in found:
        found["num_inference_steps"] = max(found["num_inference_steps"], _STEPS)
    return found


def tensor_of(result: Any) -> Any:
    import numpy
    import torch

    first = result[0] if isinstance(result, (tuple, list)) else next(iter(result.values()))
    while isinstance(first, (list, tuple)) and len(first) == 1:
        first = first[0]
    if isinstance(first, (list, tuple)):
        first = numpy.stack([numpy.asarray(f) for f in first])
    if not isinstance(first, torch.Tensor):
        first = torch.as_tensor(numpy.asarray(first))
    return first.double()


def distance(a: Any, b: Any) -> float | None:
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / max(float(b.abs().max()), 1e-9))


def build(module: str, cls: str) -> tuple[Any, Any]:
    import torch

    test = getattr(importlib.import_module(module), cls)
    test = test("__init__") if hasattr(test, "runTest") or hasattr(test, "id") else test()
    torch.manual_seed(0)
    pipe = test.pipeline_class(**test.get_dummy_components())
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return test, pipe


def attempt(module: str, cls: str) -> dict[str, Any]:
    """What came of one pipeline."""
    import torch

    import asyncdiff

    found: dict[str, Any] = {}
    try:
        test, pipe = build(module, cls)
        found["pipeline"] = type(pipe).__name__

        def run() -> Any:
            torch.manual_seed(0)
            with torch.no_grad():
                return tensor_of(pipe(**inputs_of(test)))

        plain = run()
        found["repeats"] = distance(run(), plain)
    except BaseException as e:
        return found | {"not built": told(e)}
    for name, settings in (
        ("exact", {"components": 2, "warmup": 1000}),
        ("asynchronous", {"components": 2, "warmup": 1}),
    ):
        began = time.perf_counter()
        handle = None
        try:
            handle = asyncdiff.parallelize(pipe, devices=["cpu"] * 2, split="estimate", **settings)
            found[name] = distance(run(), plain)
            report = handle.report()
            found["steps"], found["branches"] = report.steps, report.branches
        except BaseException as e:
            at = "parallelize" if handle is None else "run"
            found[f"{name} refused"] = {"at": at, "why": told(e)}
        found[f"{name} seconds"] = round(time.perf_counter() - began, 1)
        if handle is not None:
            handle.restore()
        if f"{name} refused" in found:
            break
    try:
        found["restored"] = distance(run(), plain)
    except BaseException as e:
        found["restored"] = told(e)
    return found


def told(e: BaseException) -> str:
    text = str(e).strip().splitlines()
    where = traceback.extract_tb(e.__traceback__)[-1]
    return f"{type(e).__name__}: {text[0][:300] if text else ''} [{Path(where.filename).name}]"


def child(module: str, cls: str, out: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MOST, _MOST))
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        out.send(attempt(module, cls))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("diffusers", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=results_file.ROOT / "out" / "pipelines.json")
    args = parser.parse_args()
    sys.path[:0] = [str(args.diffusers), str(Path(__file__).parent)]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
    import stand_ins

    stand_ins.install()
    fork = multiprocessing.get_context("fork")
    # Those of an earlier run of others stay.
    earlier = list(results_file.continued(args.out)) if args.only else []
    rows = [r for r in earlier if not _chosen(r["module"], args.only)]
    for module, cls in classes(args.diffusers / "tests" / "pipelines", args.only):
        found: dict[str, Any] = {"module": module, "class": cls}
        if cls.startswith("!"):
            found["not built"] = cls[2:]
        else:
            mine, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=child, args=(module, cls, theirs))
            process.start()
            theirs.close()
            try:
                found |= mine.recv() if mine.poll(_PATIENCE) else {"failed": "out of time"}
            except EOFError:
                found["failed"] = "ended"
            process.kill()
            process.join()
        rows.append(found)
        results_file.write(args.out, rows)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
