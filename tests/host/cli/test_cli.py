"""The command line, mostly with a made-up model: what is printed where, and every exit code."""

import functools
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
import asyncdiff
from asyncdiff.cli import main
from asyncdiff.errors import PlanError


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # pictures go to ./out unless told otherwise

    def call(*argv):
        code = main([str(a) for a in argv])
        out, err = capfd.readouterr()
        return code, out, err

    return call


# --- plan: from numbers alone


def test_plan_prints_the_grid_of_the_plan(run):
    from asyncdiff.schedule import plan
    from asyncdiff.schedule import text as plan_text

    code, out, err = run("plan", "-N", 3, "-S", 2, "-w", 2, "--steps", 9)
    assert code == 0 and err == ""
    assert plan_text.grid(plan.build(3, 2, 2, 9)) in out
    assert "4 ranks" in out
    code, out, _ = run("plan", "-N", 4, "-T", 9, "--schedule", "wavefront", "--delay", 2)
    assert code == 0
    assert plan_text.grid(plan.build(4, 1, 1, 9, schedule="wavefront", delay=2)) in out


def test_plan_predicts_and_draws(run, tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "new" / "t.png"
    code, out, _ = run(
        "plan", "--steps", 10, "--component-ms", "6.8,7.1", "--boundary", "0-1=58/2",
        "--link-gb-per-s", 300, "--link-latency-us", 5, "--png", png,
    )  # fmt: skip
    assert code == 0 and "times" in out and "free" not in out
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_plan_json_is_all_there_is_on_stdout(run):
    code, out, _ = run("plan", "-N", 8, "--component-ms", 2, "--json")
    data = json.loads(out)
    assert code == 0 and data["ranks"] == 8 and data["plan"][0].startswith("plan N=8")
    assert 6 < data["prediction"]["speedup"] <= 8
    assert json.loads(run("plan", "--json")[1])["prediction"] is None


@pytest.mark.parametrize(
    "argv,said",
    [
        (["plan", "-w", "0"], "warmup"),
        (["plan", "-w", "60"], "--warmup 60 exceeds the 50 steps"),
        (["plan", "--delay", "1"], "--delay belongs to --schedule wavefront"),
        (["generate", "model", "-p", "x", "--schedule", "wavefront", "--delay", "2"], "1 to 1"),
        (["calibrate", "--demo", "-N", "3", "--delay", "3"], "1 to 2 ticks"),
        (["plan", "-N", "two"], "--components"),
        (["generate", "m", "-p", "x", "--speeds", "1,fast"], "--speeds '1,fast': write positive"),
        (["generate", "m", "-p", "x", "--max-memory", "10GB,much"], "write sizes as 10GB,22GB"),
        (["generate", "m", "-p", "x", "--compress", "zip"], "--compress 'zip': write fp8, int8"),
        (["prepare", "m", "--speeds", "1,-1"], "--speeds '1,-1': write positive"),
        (["plan", "--component-ms", "1,2,3"], "3 component times"),
        (["plan", "--component-ms", "fast"], "6.8,7.1"),
        (["plan", "--component-ms", "1", "--boundary", "0=5"], "0-1=58"),
        (["plan", "--component-ms", "1", "--boundary", "1-0=5"], "1->0"),
        (["plan", "--component-ms", "1", "--link-gb-per-s", "0"], "carries nothing"),
        (["plan", "--boundary", "0-1=5"], "--component-ms"),
        (["plan", "--png", "x.png"], "needs times"),
        (["plan", "model", "--demo"], "one of them"),
        (["plan", "-w", "auto"], "plan needs a number"),
        (["demo", "--quality", "best"], "--quality best: write one of exact"),
        (["demo", "--quality", "high", "-N", "2"], "leave that out, or leave --quality out"),
        (
            ["generate", "m", "-p", "x", "--quality", "fast", "--exact-mode", "split"],
            "--exact-mode",
        ),
        (["generate", "m", "-p", "x", "--no-compile", "--compile-whole"], "leave --no-compile"),
        (["demo", "--sampler", "best"], "do: ddim, dpm, euler, unipc"),
        (["generate", "--demo", "-p", "x", "--exact-tail", "60"], "take --exact-tail 49 or less"),
        (["generate", "--demo", "-p", "x", "--load", "variant=fp16"], "not for --demo"),
        (["generate", "model", "-p", "x", "--load", "fp16"], "write NAME=VALUE"),
        (["tune", "--demo", "--psnr", "30", "--ranks", "1"], "--ranks 1: asynchronous"),
        (["tune", "--demo", "--psnr", "-1"], "--psnr -1.0: a PSNR in dB"),
        (["calibrate", "--demo", "-p", "house"], "at least 8 pictures"),
        (["calibrate", "--demo", "-w", "auto"], "set --warmup to it"),
        (["generate", "model"], "--prompt"),
        (["generate", "model", "-p", "x", "--dtype", "int8"], "--dtype"),
        (["generate", "model", "-p", "x", "-w", "long"], "a number of steps, or auto"),
        (["generate", "model", "-p", "x", "--order", "best"], "there is no such file"),
        (["demo", "--order", "pyproject.toml"], "there is no such file"),
        (["calibrate"], "a model or --demo"),
        (["calibrate", "model", "--demo"], "a model or --demo"),
        (["calibrate", "model"], "--prompt"),
        (["calibrate", "--demo", "--sampler", "best"], "ddim, dpm, euler"),
        (["calibrate", "--demo", "-w", "60"], "--warmup 60 exceeds the 50 steps"),
        (["tune", "model", "--psnr", "30"], "--prompts-file"),
        (["paint"], "paint"),
    ],
)
def test_mistakes_are_exit_code_2_and_no_traceback(run, argv, said):
    code, out, err = run(*argv)
    assert code == 2 and out == ""
    # Alike, whoever finds them: remarks on the way, then one line.
    *remarks, line = err.splitlines()
    assert line.startswith("asyncdiff: ") and said in line
    assert len(remarks) < 3 and not re.search(r" [a-z_]+=", line.split(", as ")[0]), err


def test_every_error_of_the_library_is_said_in_flags(monkeypatch):
    """No setting is named as Python has it, in whatever the library says of one."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    import test_documentation as documentation

    from asyncdiff.cli.flags import flags, in_flags

    for kind, text in documentation._raised():
        said = in_flags(text.replace("\0", "3"))
        left = [name for name in flags() if re.search(rf"(?<![\w-]){name}=\S", said)]
        # What is said of a model in Python, or by a constructor that the command line lacks.
        assert not left or re.search(r"asyncdiff\.|split=|handle\.|final_sigmas", said), (
            kind,
            said,
        )


# --- demo and generate: with a made-up pipeline


class FakePipe:
    """Draws noise from the generator; an asynchronous one draws it slightly wrong."""

    def __init__(self):
        import torch

        self.error = 0
        self.calls = []
        self.unet = torch.nn.Linear(1, 1)
        self.scheduler = types.SimpleNamespace()

    def __call__(
        self,
        prompt,
        num_inference_steps=50,
        guidance_scale=2.0,
        height=16,
        generator=None,
        callback_on_step_end=None,
        negative_prompt=None,
    ):
        import numpy as np
        import torch
        from PIL import Image

        if height % 8:
            np.dtype("no type")  # some library's ValueError or TypeError
        call = {"prompt": prompt, "steps": num_inference_steps, "height": height}
        self.calls.append(call | {"guidance": guidance_scale, "negative": negative_prompt})
        for step in range(num_inference_steps):
            if callback_on_step_end:
                callback_on_step_end(self, step, 0, {})
        array = torch.rand(height, 16, 3, generator=generator).numpy() * 200 + self.error
        return types.SimpleNamespace(images=[Image.fromarray(array.astype(np.uint8))])


@pytest.fixture
def fake(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("PIL")
    pytest.importorskip("skimage")
    pytest.importorskip("diffusers")
    from asyncdiff.cli.subject import Model
    from asyncdiff.tools import prediction

    pipe = FakePipe()
    seen = {"restored": 0, "loaded": []}

    def parallelize(given, **options):
        assert given is pipe
        seen.update(options)
        pipe.error = 9

        def restore():
            pipe.error = 0
            seen["restored"] += 1

        class Report:
            prepare_s = 0.0

            def to_dict(self):
                return {"ticks": 3, "exposed_ms": float("nan")}

            def __str__(self):
                return "the report"

        def calibrate(**call):
            from asyncdiff.sampling.calibration import Calibration, Shape

            seen["calibrated"] = call
            shape = Shape(options["components"], options["stride"], 1, options["warmup"], 0)
            return Calibration(shape, (0.5,), (0.5,), (0,), ((0.0,) * 4,), (2.0, 3.0))

        said = "components=2: because" if options.get("quality") else "given by hand"
        return types.SimpleNamespace(
            restore=restore, report=Report, calibrate=calibrate, settings=said
        )

    def pipeline(self, device, sampler=None):
        seen["loaded"].append((self.model, device, sampler))
        return pipe

    monkeypatch.setattr(asyncdiff, "parallelize", parallelize, raising=False)
    monkeypatch.setattr(Model, "pipeline", pipeline)
    monkeypatch.setattr(prediction, "predicted_speedup", lambda handle, steps: 1.75)
    seen["pipe"] = pipe
    return seen


def test_demo(run, fake, tmp_path):
    out_path = tmp_path / "a" / "demo.png"
    code, out, err = run("demo", "--steps", 4, "-S", 2, "-o", out_path)
    assert code == 0 and out_path.exists() and str(out_path) in out
    assert "mean" in out and "3 ranks share the CPU" in err
    assert fake["restored"] == 1 and fake["schedule"] == "asyncdiff" and fake["stride"] == 2
    # No speed of a CPU that stands for three devices, but what the plan says of three.
    assert "predicted for 3 devices" in out and "1.75 times the speed" in out and "ms" not in out
    assert run("demo", "--list")[1].count("\n") > 40


def test_demo_json(run, fake, tmp_path):
    prompts = ("-p", "a heart", "-p", "a house")
    path = tmp_path / "d.png"
    options = ("--schedule", "asyncdiff", "--steps", 3)
    code, out, _ = run("demo", *options, *prompts, "--json", "-o", path)
    data = json.loads(out)
    assert code == 0 and [r["prompt"] for r in data["results"]] == ["a heart", "a house"]
    assert all(20 < r["psnr_db"] < 40 and 0 < r["ssim"] < 1 for r in data["results"])
    assert data["report"] == {"ticks": 3, "exposed_ms": None}
    assert data["sampler"] == "SimpleNamespace" and data["dtype"] == "float32"
    assert (data["width"], data["height"], data["guidance_scale"]) == (16, 16, 2.0)
    assert data["python"] == (
        "asyncdiff.parallelize(pipe, devices=['cpu', 'cpu'], components=2, stride=1, warmup=1, "
        "schedule='asyncdiff', exact_tail=0, time_shift=False)"
    )
    # the same noise for both ways, other noise for each picture; the first is drawn twice
    assert len(fake["pipe"].calls) == 6
    from PIL import Image

    kept = json.loads(Image.open(path).text["asyncdiff"])
    assert kept["flags"] == data["flags"] and kept["results"] == data["results"]


def test_demo_with_wrong_devices(run, fake, tmp_path):
    out = tmp_path / "d.png"
    code, text, err = run("demo", "-N", 2, "--devices", "cpu,cpu,cpu", "-o", out)
    assert (code, text) == (2, "") and "3 devices for 2 ranks: --components" in err
    assert run("demo", "--devices", "cpu,,cpu")[0] == 2
    options = ("--demo", "-p", "x", "--split-guidance", "--devices", "cpu,cpu", "-o", out)
    code, text, err = run("generate", *options)
    assert code == 2 and "2 x (--components + --stride - 1)" in err


def test_calibrate_and_use_it(run, fake, tmp_path):
    path = tmp_path / "a" / "c.json"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\n" + "more\n" * 5)
    numbers = ("-N", 3, "-w", 2, "--delay", 2, "--steps", 6)
    code, out, err = run(
        "calibrate", "model", *numbers, "--prompts-file", prompts, "-p", "zero", "--guidance", 4,
        "-o", path,
    )  # fmt: skip
    assert code == 0, err
    assert fake["calibrated"]["prompt"] == ["zero", "one", "two", *["more"] * 5]
    assert fake["calibrated"]["guidance_scale"] == 4
    assert fake["schedule"] == "wavefront" and fake["restored"] == 1 and fake["delay"] == 2
    assert "taken: +2.5 dB over the default, at worst +2.0, on 2 pictures" in out
    assert str(path) in out
    from asyncdiff import Calibration

    more = ("--schedule", "wavefront", "--order", path, "-o", tmp_path / "g.png")
    code, out, err = run("generate", "model", "-p", "x", *numbers, *more)
    assert code == 0, err
    assert fake["order"] == Calibration.load(path) and fake["warmup"] == 2
    assert f"order=Calibration.load('{path}')" in out and f"--order {path}" in out
    more = ("--schedule", "wavefront", "--order", "0.5", "-w", "auto", "-o", tmp_path / "g.png")
    assert run("generate", "model", "-p", "x", *more)[0] == 0
    assert fake["order"] == 0.5 and fake["warmup"] == "auto"
    code, out, _ = run("calibrate", "--demo", "--steps", 6, "--json", "-o", path)
    assert code == 0 and json.loads(out)["gains_db"] == [2.0, 3.0]
    assert len(fake["calibrated"]["prompt"]) == 16 and fake["loaded"][-1][2] == "ddim"


def test_generate_and_compare(run, fake, tmp_path):
    path = tmp_path / "g.png"
    argv = ["generate", "some/model", "-p", "a cat", "--steps", 3, "-o", path, "--height", 16]
    code, out, _ = run(*argv, "--sampler", "euler", "--guidance", 5, "--negative", "dogs")
    assert code == 0 and "the report" in out and path.exists()
    call = {"prompt": "a cat", "steps": 3, "height": 16, "guidance": 5, "negative": "dogs"}
    assert fake["pipe"].calls[-1] == call
    assert fake["loaded"] == [("some/model", "cpu", "euler")]
    assert "some/model: FakePipe" in out and "guidance 5.0" in out
    assert "some/model --devices cpu,cpu --quality balanced" in out
    again = "--steps 3 --sampler euler --guidance 5.0 --height 16 --negative dogs --seed 0"
    assert again.split() == out[out.index("--steps 3") :].splitlines()[0].split()
    code, out, _ = run(*argv, "--compare", "--json")
    data = json.loads(out)
    assert code == 0 and data["psnr_db"] > 20 and data["sequential_ms"] > 0
    assert data["ranks_share_a_device"] and data["predicted_speedup"] == 1.75
    code, _, err = run(*argv, "--devices", "tpu")
    assert code == 2 and "'tpu' is not a device" in err
    code, _, err = run(*argv[:-2], "--width", 16)
    assert code == 2 and "FakePipe takes no --width" in err


def test_a_quality_chooses_unless_the_command_line_does(run, fake, tmp_path):
    path = ("--steps", 3, "-o", tmp_path / "x.png")
    for command in (["demo"], ["generate", "m", "-p", "x"]):
        fake.pop("schedule", None)
        for asked, quality in (((), "balanced"), (("--quality", "high"), "high")):
            code, out, err = run(*command, *asked, *path)
            assert code == 0, err
            assert fake["quality"] == quality and "schedule" not in fake
            # What one device cannot show, two ranks that share it do.
            assert fake["devices"] == ["cpu", "cpu"] and "2 ranks share the CPU" in err
            assert f"quality {quality} picked components=2: because" in out
            assert f"--quality {quality}" in out and f"quality={quality!r}" in out
        # A default that is written down is given, too.
        for by_hand in (("-N", 2), ("--warmup", 1), ("--schedule", "asyncdiff")):
            fake.pop("quality", None)
            code, out, err = run(*command, *by_hand, *path)
            assert code == 0, err
            assert "quality" not in fake and fake["schedule"] == "asyncdiff"
            assert "picked" not in out and "--components 2" in out
        assert run(*command, "--devices", "cpu", *path)[0] == 0
        assert fake["devices"] == ["cpu", "cpu"]
        assert run(*command, "--devices", "cpu,cpu,cpu", *path)[0] == 0
        assert fake["devices"] == ["cpu"] * 3
    data = json.loads(run("generate", "m", "-p", "x", "--json", *path)[1])
    assert (data["quality"], data["settings"]) == ("balanced", "components=2: because")


def test_the_time_of_a_picture_is_without_preparation(run, fake, monkeypatch, tmp_path):
    """However long preparing takes, and whichever picture it is a part of."""
    import time

    plain = asyncdiff.parallelize

    def slow(pipe, **options):
        handle = plain(pipe, **options)
        call = FakePipe.__call__

        def first(self, *args, **more):
            time.sleep(0.5)
            monkeypatch.setattr(FakePipe, "__call__", call)
            return call(self, *args, **more)

        monkeypatch.setattr(FakePipe, "__call__", functools.wraps(call)(first))
        report = handle.report()
        report.prepare_s = 0.5
        handle.report = lambda: report
        return handle

    monkeypatch.setattr(asyncdiff, "parallelize", slow, raising=False)
    argv = ["generate", "model", "-p", "a cat", "--steps", 3, "-o", tmp_path / "g.png", "--json"]
    data = json.loads(run(*argv)[1])
    assert data["prepare_s"] == 0.5 and 0 < data["asynchronous_ms"] < 400


# --- what is written


def test_a_picture_is_what_its_name_says(run, fake, tmp_path):
    from PIL import Image

    for name, kind in (("a.jpg", "JPEG"), ("b.webp", "WEBP"), ("c.PNG", "PNG")):
        path = tmp_path / name
        assert run("generate", "m", "-p", "x", "--steps", 1, "-o", path)[0] == 0
        picture = Image.open(path)
        assert picture.format == kind
        told = picture.text["asyncdiff"] if kind == "PNG" else picture.getexif()[0x010E]
        assert json.loads(told)["prompt"] == "x"
    for name in ("a.gif", "a"):
        code, _, err = run("generate", "m", "-p", "x", "-o", tmp_path / name)
        assert code == 2 and "ends in .png, .jpg, .jpeg or .webp" in err
    code, _, err = run("plan", "--component-ms", 1, "--png", tmp_path / "x.jpg")
    assert code == 2 and "ends in .png" in err


WRITERS = {
    "demo": ["demo", "-o"],
    "generate": ["generate", "--demo", "-p", "house", "-o"],
    "plan": ["plan", "--component-ms", "1", "--png"],
    "tune": ["tune", "--demo", "--psnr", "20", "--png"],
    "calibrate": ["calibrate", "--demo", "-o"],
    "bench": ["bench", "exchange", "--devices", "cpu", "--png"],
}


@pytest.mark.parametrize("command", WRITERS)
def test_what_cannot_be_written_is_found_before_the_work(run, monkeypatch, command, tmp_path):
    from asyncdiff.cli import files
    from asyncdiff.cli.subject import Model

    def work(*args, **more):
        raise AssertionError("it has begun to work")

    monkeypatch.setattr(Model, "pipeline", work)
    if command == "bench":
        monkeypatch.setattr("asyncdiff_bench.runner.run", work)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path, why in (("file/x.png", "cannot write"), ("folder.png", "is a folder")):
        code, out, err = run(*WRITERS[command], tmp_path / path)
        assert (code, out) == (2, "") and why in err.splitlines()[-1]

    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", lambda dir: Full())
    code, out, err = run(*WRITERS[command], tmp_path / "x.png")
    assert (code, out) == (2, "") and err.endswith(": No space left on device\n")
    assert err.count("\n") == 1, err


def test_a_disk_that_is_full(tmp_path):
    """A limit on the size of files stands for it: writing really fails."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
        "from asyncdiff.cli import main; "
        "sys.exit(main(['plan', '--component-ms', '1', '--png', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.png")]
    done = subprocess.run(command, check=False, capture_output=True)
    assert done.returncode == 2 and b"cannot write" in done.stderr, done.stderr


# --- mistakes that a library finds


def test_a_librarys_value_error_is_one_line(run, fake, monkeypatch, tmp_path):
    out = ("-o", tmp_path / "x.png")

    def refuse(self, prompt, height=16, **rest):
        import statistics

        statistics.NormalDist(0, -1) if height == 100 else None
        raise ValueError("of the command line's own")

    argv = ["generate", "model", "-p", "x", "--steps", 1, *out]
    monkeypatch.setattr(FakePipe, "__call__", refuse)
    refuse.__globals__["__name__"] = "test_cli"
    code, _, err = run(*argv, "--height", 100)
    assert code == 2 and err.splitlines()[-1].startswith("asyncdiff: FakePipe refuses: ")
    # What is raised inside asyncdiff is a fault, and its traceback is wanted.
    monkeypatch.setattr(
        "asyncdiff.cli.running._first", lambda output: int("what no library has asked for")
    )
    monkeypatch.setattr(FakePipe, "__call__", lambda self, prompt, **rest: None)
    with pytest.raises(ValueError, match="invalid literal"):
        run(*argv)


def test_several_processes_are_refused(run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("demo")
    assert code == 2 and "so start it without" in err
    assert run("plan")[0] == 0
    from asyncdiff import launcher

    launcher.warn_of_processes.cache_clear()
    with pytest.warns(UserWarning, match="process 1 of 2"):
        launcher.warn_of_processes()
    launcher.warn_of_processes()  # once
    monkeypatch.setenv("WORLD_SIZE", "1")
    launcher.warn_of_processes.cache_clear()
    launcher.warn_of_processes()


def test_plan_of_a_model(run, fake, monkeypatch):
    report = {
        "components": [{"ms": 3.0}, {"ms": 4.0}],
        "boundaries": [{"source": 0, "target": 1, "bytes": 1000, "tail_bytes": 10}],
    }

    class Report:
        boundaries = (types.SimpleNamespace(source=0, target=1),)

        def to_dict(self):
            return report

        def __str__(self):
            return "component 0 [3 ms]"

    module = types.ModuleType("asyncdiff.integrations.diffusers.pipeline")
    module.plan_partition = lambda pipe, components, **options: types.SimpleNamespace(report=Report)
    monkeypatch.setitem(sys.modules, "asyncdiff.integrations.diffusers.pipeline", module)
    monkeypatch.setattr(asyncdiff, "diffusers", module, raising=False)
    code, out, _ = run("plan", "--demo", "--steps", 5)
    assert code == 0 and "component 0 [3 ms]" in out and "23.0 ms" in out
    data = json.loads(run("plan", "some/model", "--json")[1])
    assert data["partition"] == report and data["prediction"]["sequential_ms"] == 350
    # times given by hand go before measured ones; measured boundaries stay
    data = json.loads(run("plan", "--demo", "--component-ms", "1", "--json")[1])
    assert data["prediction"]["sequential_ms"] == 100
    assert data["prediction"]["exchange_bytes"] == 50 * 1000


def test_a_model_that_is_not_there(run, monkeypatch):
    pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    pytest.importorskip("asyncdiff_core")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run("generate", "/no/such/model", "-p", "x", "--devices", "cpu")
    assert (code, out) == (2, "") and "cannot load '/no/such/model'" in err
    assert "Traceback" not in err


# --- the rest


def test_cache(run, tmp_path, monkeypatch):
    from asyncdiff.preparation.folder import preparations

    code, out, _ = run("cache", "show")  # tests keep nothing
    assert code == 0 and "nothing is kept" in out
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    preparations().write("graph", "abc", "a toy", {})
    code, out, _ = run("cache", "show")
    assert code == 0 and "a toy" in out and "1 entries" in out and str(tmp_path) in out
    (entry,) = json.loads(run("cache", "show", "--json")[1])["entries"]
    assert (entry["kind"], entry["key"], entry["of"]) == ("graph", "abc", "a toy")
    assert "removed 1 entries" in run("cache", "clear")[1]
    assert not json.loads(run("cache", "show", "--json")[1])["entries"]


def test_cache_of_what_is_compiled(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for name in ("asyncdiff/note", "fxgraph/ab/graph", "xy/cxyz.py", "mine/notes.txt", "me/cv.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("four")
    told = json.loads(run("cache", "show", "--json")[1])["compiled"]
    assert told == {"folder": str(tmp_path), "bytes": 20}
    assert str(tmp_path) in run("cache", "show")[1]
    assert run("cache", "clear", "--compiled")[0] == 0
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["me", "mine"]  # what is nobody's but the user's


@pytest.mark.slow
def test_prepare(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ASYNCDIFF_CACHE", str(tmp_path))
    options = ("--demo", "-N", 2, "-T", 3, "--devices", "cpu", "--size", "64x32", "--size", "32x32")
    code, out, err = run("prepare", *options, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["kept_in"] == str(tmp_path / "preparations")
    first, second = told["prepared"]
    assert (first["width"], first["height"], second["width"]) == (64, 32, 32)
    assert first["phases"]["export"] > 0 and first["seconds"] >= first["phases"]["export"]
    code, out, _ = run("prepare", *options)
    assert code == 0 and "64 x 32: " in out and "export" not in out and "kept in" in out
    kept = json.loads(run("cache", "show", "--json")[1])["entries"]
    assert sorted(e["kind"] for e in kept) == ["cuts", "cuts", "graph", "graph"]


@pytest.mark.parametrize(
    "options,said",
    [
        (("--size", "64"), "--size '64': write WIDTHxHEIGHT"),
        (("--size", "64x64", "--height", "32"), "leave those out"),
    ],
)
def test_prepare_says_what_is_wrong(run, options, said):
    code, _, err = run("prepare", "--demo", *options)
    assert code == 2 and said in err


def test_doctor(run, monkeypatch):
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0 and "use" in found
    monkeypatch.setattr("asyncdiff.tools.doctor.collect", lambda *_: found)
    assert "will use" in run("doctor")[1]


def test_errors_of_the_core_and_missing_extras(run, monkeypatch):
    from asyncdiff.schedule import plan

    def fail(error):
        def build(*args, **kwargs):
            raise error

        monkeypatch.setattr(plan, "build", build)
        return run("plan")

    error = type("ChannelError", (RuntimeError,), {"__module__": "asyncdiff_core.errors"})
    assert fail(error("no slot\nleft"))[::2] == (2, "asyncdiff: no slot left\n")
    code, _, err = fail(ModuleNotFoundError("no", name="diffusers.models"))
    assert code == 2 and "asyncdiff[diffusers]" in err
    code, _, err = fail(PlanError("bad"))
    assert (code, err) == (2, "asyncdiff: bad\n")
    code, _, err = fail(KeyboardInterrupt())
    assert code == 130
    with pytest.raises(ZeroDivisionError):  # our own faults are not dressed up
        fail(ZeroDivisionError())


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from asyncdiff.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'diffusers', 'matplotlib'}; "
        "heavy &= set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = "demo generate prepare plan tune calibrate doctor bench cache"
    for command in commands.split():
        assert command in done.stdout


def test_python_m():
    command = [sys.executable, "-m", "asyncdiff", "plan", "-w", "0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("asyncdiff: --warmup")
