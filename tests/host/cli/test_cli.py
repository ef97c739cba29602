"""The command line, mostly with a made-up model: what is printed where, and every exit code."""

import json
import subprocess
import sys
import types

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
import asyncdiff
from asyncdiff.cli import main
from asyncdiff.errors import DeviceError, PlanError


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
        (["plan", "-w", "60"], "warmup=60 exceeds the 50 steps"),
        (["plan", "--delay", "1"], "delay belongs"),
        (["generate", "model", "-p", "x", "--schedule", "wavefront", "--delay", "2"], "1 to 1"),
        (["calibrate", "--demo", "-N", "3", "--delay", "3"], "1 to 2 ticks"),
        (["plan", "-N", "two"], "--components"),
        (["plan", "--component-ms", "1,2,3"], "3 component times"),
        (["plan", "--component-ms", "fast"], "6.8,7.1"),
        (["plan", "--component-ms", "1", "--boundary", "0=5"], "0-1=58"),
        (["plan", "--component-ms", "1", "--boundary", "1-0=5"], "1->0"),
        (["plan", "--component-ms", "1", "--link-gb-per-s", "0"], "carries nothing"),
        (["plan", "--boundary", "0-1=5"], "--component-ms"),
        (["plan", "--png", "x.png"], "needs times"),
        (["plan", "model", "--demo"], "not both"),
        (["demo", "--sampler", "best"], "ddim, dpm, euler"),
        (["generate", "model"], "--prompt"),
        (["generate", "model", "-p", "x", "--dtype", "int8"], "--dtype"),
        (["generate", "model", "-p", "x", "-w", "long"], "a number of steps, or auto"),
        (["generate", "model", "-p", "x", "--order", "best"], "there is no such file"),
        (["demo", "--order", "pyproject.toml"], "there is no such file"),
        (["calibrate"], "a model or --demo"),
        (["calibrate", "model", "--demo"], "a model or --demo"),
        (["calibrate", "model"], "--prompt"),
        (["calibrate", "--demo", "--sampler", "best"], "ddim, dpm, euler"),
        (["calibrate", "--demo", "-w", "60"], "warmup=60 exceeds the 50 steps"),
        (["tune", "model", "--psnr", "30"], "--prompts-file"),
        (["paint"], "paint"),
    ],
)
def test_mistakes_are_exit_code_2_and_no_traceback(run, argv, said):
    code, out, err = run(*argv)
    assert code == 2 and out == "" and "Traceback" not in err
    assert said in " ".join(err.replace("│", " ").split())


# --- demo and generate: with a made-up pipeline


class FakePipe:
    """Draws noise from the generator; an asynchronous one draws it slightly wrong."""

    def __init__(self):
        self.error = 0
        self.calls = []
        self.device = None

    def __call__(
        self, prompt, num_inference_steps=50, generator=None, callback_on_step_end=None, **rest
    ):
        import numpy as np
        import torch
        from PIL import Image

        self.calls.append({"prompt": prompt, "steps": num_inference_steps, **rest})
        for step in range(num_inference_steps):
            if callback_on_step_end:
                callback_on_step_end(self, step, 0, {})
        array = torch.rand(16, 16, 3, generator=generator).numpy() * 200 + self.error
        return types.SimpleNamespace(images=[Image.fromarray(array.astype(np.uint8))])

    def to(self, device):
        if device not in ("cpu", "cuda:0", "cuda:1"):
            raise RuntimeError(f"Expected one of cpu, cuda, not {device}\nmore")
        self.device = device


@pytest.fixture
def fake(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("PIL")
    pytest.importorskip("skimage")
    pipe = FakePipe()
    seen = {"restored": 0}

    def parallelize(given, **options):
        assert given is pipe
        seen.update(options)
        ranks = options["components"] + options["stride"] - 1
        if len(options["devices"]) != ranks:
            raise DeviceError(f"{ranks} ranks need {ranks} devices")
        pipe.error = 9

        def restore():
            pipe.error = 0
            seen["restored"] += 1

        class Report:
            def to_dict(self):
                return {"ticks": 3, "exposed_ms": float("nan")}

            def __str__(self):
                return "the report"

        def calibrate(**call):
            from asyncdiff.sampling.calibration import Calibration, Shape

            seen["calibrated"] = call
            shape = Shape(options["components"], options["stride"], 1, options["warmup"], 0)
            tried = {"line of order 0": 0.5, "sequential clean image": 0.25}
            return Calibration(shape, (0.5,), (0.5,), (0,), ((0.0,) * 4,), tried)

        return types.SimpleNamespace(restore=restore, report=Report, calibrate=calibrate)

    model = types.ModuleType("asyncdiff.demo.model")
    model.known_prompts = lambda: [f"picture {i}" for i in range(20)]
    model.load = lambda device, dtype=None, scheduler="ddim": pipe
    monkeypatch.setattr("asyncdiff.demo.model", model)
    monkeypatch.setattr(asyncdiff, "parallelize", parallelize, raising=False)
    devices = types.ModuleType("asyncdiff.runtime.devices")
    devices.resolve = lambda given, ranks: given or ["cpu"] * ranks
    monkeypatch.setitem(sys.modules, "asyncdiff.runtime.devices", devices)
    monkeypatch.setattr("asyncdiff.cli.generate.load", lambda name, dtype: pipe)
    seen["pipe"] = pipe
    return seen


def test_demo(run, fake, tmp_path):
    out_path = tmp_path / "a" / "demo.png"
    code, out, err = run("demo", "--steps", 4, "-S", 2, "-o", out_path)
    assert code == 0 and out_path.exists() and str(out_path) in out
    assert "picture 3" in out and "mean" in out and "3 ranks share the CPU" in err
    assert fake["devices"] == ["cpu"] * 3 and fake["restored"] == 1


def test_demo_json(run, fake, tmp_path):
    prompts = ("-p", "a heart", "-p", "a house")
    code, out, _ = run("demo", "--steps", 3, *prompts, "--json", "-o", tmp_path / "d.png")
    data = json.loads(out)
    assert code == 0 and [r["prompt"] for r in data["results"]] == ["a heart", "a house"]
    assert all(20 < r["psnr_db"] < 40 and 0 < r["ssim"] < 1 for r in data["results"])
    assert data["report"] == {"ticks": 3, "exposed_ms": None}
    # the same noise for both ways, other noise for each picture; the first is drawn twice
    assert len(fake["pipe"].calls) == 6


def test_demo_with_wrong_devices(run, fake, tmp_path):
    code, out, err = run("demo", "--devices", "cpu,cpu,cpu", "-o", tmp_path / "d.png")
    assert (code, out) == (2, "") and "2 ranks need 2 devices" in err and "Traceback" not in err
    assert run("demo", "--devices", "cpu,,cpu")[0] == 2


def test_calibrate_and_use_it(run, fake, tmp_path):
    path = tmp_path / "a" / "c.json"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\n")
    numbers = ("-N", 3, "-w", 2, "--delay", 2, "--steps", 6)
    code, out, err = run(
        "calibrate", "model", *numbers, "--prompts-file", prompts, "-p", "zero", "--guidance", 4,
        "-o", path,
    )  # fmt: skip
    assert code == 0, err
    assert fake["calibrated"]["prompt"] == ["zero", "one", "two"]
    assert fake["calibrated"]["guidance_scale"] == 4
    assert fake["schedule"] == "wavefront" and fake["restored"] == 1 and fake["delay"] == 2
    assert (
        "taken  sequential clean image: 0.2500" in out and "tried  line" in out and str(path) in out
    )
    from asyncdiff import Calibration

    more = ("--schedule", "wavefront", "--order", path, "-o", tmp_path / "g.png")
    assert run("generate", "model", "-p", "x", *numbers, *more)[0] == 0
    assert fake["order"] == Calibration.load(path) and fake["warmup"] == 2
    more = ("--schedule", "wavefront", "--order", "0.5", "-w", "auto", "-o", tmp_path / "g.png")
    assert run("generate", "model", "-p", "x", *more)[0] == 0
    assert fake["order"] == 0.5 and fake["warmup"] == "auto"
    code, out, _ = run("calibrate", "--demo", "--steps", 6, "--json", "-o", path)
    assert code == 0 and json.loads(out)["tried"]["sequential clean image"] == 0.25
    assert len(fake["calibrated"]["prompt"]) == 16


def test_generate_and_compare(run, fake, tmp_path):
    path = tmp_path / "g.png"
    argv = ["generate", "some/model", "-p", "a cat", "--steps", 3, "-o", path, "--height", 16]
    code, out, _ = run(*argv)
    assert code == 0 and "the report" in out and path.exists()
    assert fake["pipe"].calls[-1] == {"prompt": "a cat", "steps": 3, "height": 16}
    code, out, _ = run(*argv, "--compare", "--json")
    data = json.loads(out)
    assert code == 0 and data["psnr_db"] > 20 and data["sequential_ms"] > 0
    code, _, err = run(*argv, "--devices", "tpu")
    assert code == 2 and "cannot use tpu" in err and "more" not in err


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


def test_doctor(run):
    code, out, _ = run("doctor", "--json")
    assert code == 0 and "use" in json.loads(out)
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
        "heavy = {'torch', 'numpy', 'diffusers', 'matplotlib', 'asyncdiff_core'}; "
        "heavy &= set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "generate", "plan", "tune", "calibrate", "doctor", "bench"):
        assert command in done.stdout


def test_python_m():
    command = [sys.executable, "-m", "asyncdiff", "plan", "-w", "0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("asyncdiff: warmup")
