"""What this machine offers to asyncdiff, what will be used, and why not the rest.

Whatever touches a driver runs in a child process with a deadline, and reports piece by piece: a
driver that crashes or hangs costs the doctor that piece and no more. Works with nothing but a CPU.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

PACKAGES = (
    "asyncdiff", "torch", "triton", "diffusers", "transformers", "accelerate", "numpy",
    "pillow", "scikit-image", "matplotlib", "typer", "rich",
)  # fmt: skip
PROBE_SECONDS = 180
#: Links that have less than this share of their speed, while all pairs send, share a way.
_SHARED = 0.7
#: codes of ``nvidia-smi topo -m`` that are no NVLink
BUSES = {
    "PIX": "PCIe, one switch",
    "PXB": "PCIe, several switches",
    "PHB": "PCIe through the host bridge",
    "NODE": "PCIe, one NUMA node",
    "SYS": "PCIe and the link between sockets",
}


def version(package: str) -> str | None:
    """The installed version of a distribution, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect(step: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Everything as plain data. ``step`` is called four times on the way."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in PACKAGES},
        "nvcc": _nvcc(),
    }
    step()
    found["driver"] = _driver()
    step()
    found |= probe()
    step()
    buses = _buses(found)
    for link in found.get("links", []):
        link["bus"] = buses.get((link["from"], link["to"]))
    found["use"], found["remarks"] = judge(found)
    step()
    return found


def _output(*command: str) -> str:
    """What a command says; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _nvcc() -> str | None:
    found = re.search(r"release ([\d.]+)", _output("nvcc", "--version"))
    return found[1] if found else None


def _driver() -> dict[str, Any]:
    """What nvidia-smi sees; it ignores CUDA_VISIBLE_DEVICES."""
    fields = "index,uuid,name,driver_version"
    text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    rows = [row for row in rows if len(row) == 4 and row[0].isdigit()]
    return {
        "version": rows[0][3] if rows else None,
        "gpus": [{"index": int(r[0]), "uuid": r[1], "name": r[2]} for r in rows],
        "hidden_by": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def probe(seconds: float = PROBE_SECONDS) -> dict[str, Any]:
    """Torch, the core and the links as a child process sees them; ``probe_failed`` says what
    went wrong if it did not come to its end."""
    command = [sys.executable, "-m", "asyncdiff.tools.doctor"]
    path = os.pathsep.join(p for p in sys.path if p)  # as we were found, so shall the child
    env, failed = {**os.environ, "PYTHONPATH": path}, None
    try:
        done = subprocess.run(command, check=False, capture_output=True, timeout=seconds, env=env)
        told = done.stdout
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            failed = f"the probe ended with {done.returncode}: {' '.join(last)}"
    except subprocess.TimeoutExpired as error:
        told = error.stdout or b""
        failed = f"the probe did not answer within {seconds:.0f} s"
    found: dict[str, Any] = {"probe_failed": failed}
    for line in told.decode(errors="replace").splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _probe_torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation raises OSError as often as ImportError
        return {"torch": {"error": _said(error)}}
    facts: dict[str, Any] = {"version": str(torch.__version__), "cuda": torch.version.cuda}
    gpus = []
    if torch.cuda.is_available():
        facts["architectures"] = torch.cuda.get_arch_list()
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            gpu = {"index": index, "name": p.name, "uuid": str(getattr(p, "uuid", ""))}
            memory, capability = round(p.total_memory / 2**30, 1), f"{p.major}.{p.minor}"
            gpus.append(gpu | {"memory_gib": memory, "capability": capability})
    elif torch.version.cuda:
        try:
            torch.cuda.init()
        except Exception as error:
            facts["error"] = str(error).splitlines()[0]
    return {"torch": facts, "gpus": gpus}


def _probe_core() -> dict[str, Any]:
    try:
        import asyncdiff_core

        build = dict(asyncdiff_core.build_info())
        found: dict[str, Any] = {"cuda_built": bool(asyncdiff_core.cuda_built()), "build": build}
        return {"core": found, **_simulated()}
    except Exception as error:
        return {"core": {"error": _said(error)}}


def _probe_speeds(gpus: int) -> dict[str, Any]:
    """What each GPU does, one after another, while nothing of ours runs there."""
    try:
        import torch

        from .speed import compare, rates

        found = [rates(torch.device("cuda", index)) for index in range(gpus)]
        speeds = compare(found)
        return {"speeds": [r | {"speed": s} for r, s in zip(found, speeds, strict=True)]}
    except Exception as error:
        return {"speeds": [], "speeds_error": _said(error)}


def _simulated() -> dict[str, Any]:
    """The link that ranks are made to have (ASYNCDIFF_LINK)."""
    import asyncdiff_core

    try:
        return {"simulated_link": asyncdiff_core.simulated_link()}
    except asyncdiff_core.InvalidArgument as error:
        return {"simulated_link": None, "links_error": _said(error)}


def _probe_links(gpus: int) -> dict[str, Any]:
    """Build a fabric over all GPUs: it writes and reads back in each direction."""
    try:
        import asyncdiff_core

        fabric = asyncdiff_core.CudaFabric(list(range(gpus)))
        reasons = fabric.link_reasons()
        links = [
            {"from": a, "to": b, "kind": str(kind), "reason": reasons.get((a, b)) or None}
            for (a, b), kind in sorted(fabric.links().items())
            if a != b
        ]
        return {"links": links}
    except Exception as error:
        return {"links": [], "links_error": _said(error)}


def _child() -> None:
    def say(facts: dict[str, Any]) -> dict[str, Any]:
        print(json.dumps(facts, default=str), flush=True)
        return facts

    gpus = len(say(_probe_torch()).get("gpus", []))
    core = say(_probe_core())["core"]
    if gpus > 0:
        say(_probe_speeds(gpus))
    if gpus > 1 and core.get("cuda_built"):
        links = say(_probe_links(gpus))["links"]
        if links:
            from .link_speeds import add_speeds

            say(add_speeds(links, "cuda"))


def _buses(found: dict[str, Any]) -> dict[tuple[int, int], str]:
    """NVLink or PCIe between visible GPUs, from ``nvidia-smi topo -m``."""
    if len(found.get("gpus", [])) < 2:
        return {}
    matrix = read_topology(_output("nvidia-smi", "topo", "-m"))
    # Torch counts visible devices only; the UUID says which one of the machine's each is.
    place = {g["uuid"].removeprefix("GPU-"): g["index"] for g in found["driver"]["gpus"]}
    visible = {
        place.get(g["uuid"].removeprefix("GPU-"), g["index"]): g["index"] for g in found["gpus"]
    }
    return {
        (visible[a], visible[b]): bus
        for (a, b), bus in matrix.items()
        if a in visible and b in visible
    }


def read_topology(text: str) -> dict[tuple[int, int], str]:
    """The matrix of ``nvidia-smi topo -m`` in words, by pair of GPU numbers."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line.split() for line in text.splitlines() if line.strip()]
    heads = next(([c for c in cells if re.fullmatch(r"GPU\d+", c)] for cells in lines), [])
    out: dict[tuple[int, int], str] = {}
    for cells in lines:
        if not re.fullmatch(r"GPU\d+", cells[0]) or cells[: len(heads)] == heads:
            continue
        for head, code in zip(heads, cells[1:], strict=False):
            link = re.fullmatch(r"NV(\d+)", code)
            words = f"NVLink, {link[1]} links" if link else BUSES.get(code)
            if words:
                out[(int(cells[0][3:]), int(head[3:]))] = words
    return out


def judge(found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The devices that ``devices=None`` takes, and every reason why something is not used."""
    remarks = []
    torch, core, gpus = found.get("torch", {}), found.get("core", {}), found.get("gpus", [])
    real, hidden = found["driver"]["gpus"], found["driver"]["hidden_by"]
    if found.get("probe_failed"):
        remarks.append(found["probe_failed"])
    if "version" not in torch:
        remarks.append(f"torch cannot be imported: {torch.get('error', 'unknown')}")
    if "error" in core:
        remarks.append(f"the core extension cannot be imported: {core['error']}")
    why = None if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden!r}"
    if not real and not gpus:
        remarks.append("no GPU: nvidia-smi sees none")
    elif not gpus and "version" in torch:
        if not torch.get("cuda"):
            why = f"torch {torch['version']} is a build without CUDA"
        remarks.append(f"GPUs unused: {why or torch.get('error', 'torch sees none')}")
    elif len(gpus) < len(real):
        unused = f"{len(real) - len(gpus)} of {len(real)} GPUs unused"
        remarks.append(f"{unused}: {why or 'torch does not see them'}")
    usable = []
    for gpu in gpus:
        needed = "sm_" + gpu["capability"].replace(".", "")
        known = torch.get("architectures") or [needed]
        # a build for an older architecture of the same generation runs on a newer one
        same = [a for a in known if re.match(rf"(sm|compute)_{needed[3:-1]}\d[af]?$", a)]
        if same or any(a.startswith("compute_") for a in known):
            usable.append(f"cuda:{gpu['index']}")
        else:
            remarks.append(f"cuda:{gpu['index']} unused: this torch has no code for {needed}")
    if usable and core.get("cuda_built") is False:
        remarks.append(
            "GPUs unused: the core was built without CUDA; ASYNCDIFF_CUDA=on pip install ."
        )
        usable = []
    if found.get("speeds_error"):
        remarks.append(f"how fast GPUs are could not be measured: {found['speeds_error']}")
    if found.get("links_error"):
        remarks.append(f"links between GPUs could not be tried: {found['links_error']}")
    if found.get("simulated_link"):
        remarks.append(f"links are simulated: ASYNCDIFF_LINK={found['simulated_link']}")
    for link in found.get("links", []):
        way = f"cuda:{link['from']} to cuda:{link['to']}"
        if link["kind"] == "staged":
            reason = link["reason"] or "no reason given"
            remarks.append(f"{way} goes through staged memory: {reason}")
        speed = link.get("gb_per_s")
        if speed and speed["all_pairs"] < _SHARED * speed["alone"]:
            share = f"{speed['all_pairs']:.3g} of {speed['alone']:.3g} GB/s"
            remarks.append(f"{way} has {share} while all pairs send: they share a way")
    for name in ("diffusers", "transformers"):
        if found["versions"].get(name) is None:
            remarks.append(f"{name} is not installed: pip install 'asyncdiff[diffusers]'")
    if "error" in core or "version" not in torch:
        return [], remarks
    return usable or ["cpu"], remarks


def tell(found: dict[str, Any]) -> str:
    """The findings for people."""
    core, torch = found.get("core", {}), found.get("torch", {})
    versions = ", ".join(f"{n} {v}" for n, v in found["versions"].items() if v)
    built = "missing"
    if "cuda_built" in core:
        facts = ", ".join(f"{k} {v}" for k, v in core.get("build", {}).items())
        built = f"built {'with' if core['cuda_built'] else 'without'} CUDA"
        built += f" ({facts})" if facts else ""
    lines = [
        f"python     {found['python']} on {found['system']}, {found['cores']} cores",
        f"packages   {versions or 'none'}",
        f"torch      {torch.get('version', 'missing')}, CUDA {torch.get('cuda') or 'none'}",
        f"core       {built}",
        f"driver     {found['driver']['version'] or 'none'}; nvcc {found['nvcc'] or 'none'}",
    ]
    for gpu in found.get("gpus", []):
        about = f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}"
        speeds = found.get("speeds", [])
        if gpu["index"] < len(speeds):
            s = speeds[gpu["index"]]
            about += f"; {s['tflops']:.0f} TFLOPS, {s['gb_per_s']:.0f} GB/s"
            about += f", {100 * s['speed']:.0f} % of the fastest" if len(speeds) > 1 else ""
        lines.append(f"cuda:{gpu['index']}     {about}")
    for link in found.get("links", []):
        bus = f" ({link['bus']})" if link.get("bus") else ""
        way = f"cuda:{link['from']} to cuda:{link['to']}: {link['kind']}{bus}"
        if "gb_per_s" in link:
            alone, both, every = (f"{x:.3g}" for x in link["gb_per_s"].values())
            way += f", {alone} GB/s; {both} both ways at once, {every} all pairs at once"
            way += f"; {link['latency_us']:.3g} µs"
        lines.append(f"link       {way}")
    lines.append(f"will use   {', '.join(found['use']) or 'nothing: see below'}")
    lines += [f"note       {remark}" for remark in found["remarks"]]
    return "\n".join(lines)


if __name__ == "__main__":
    _child()
