"""The house stays as docs/design.md draws it: imports go down only, nothing goes in a circle, no
package or file grows too large. Read from the sources, imports inside of functions and for type
checkers included."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "asyncdiff"
CSRC = ROOT / "csrc"
#: Packages and modules of ``asyncdiff``, from the lowest up: each may import those below its line.
LAYERS = (
    ("errors",),
    ("progress", "deadline", "launcher", "forking", "memory", "environment", "quiet"),
    ("phases", "turns"),
    ("graph", "schedule"),
    ("microbatches", "sequence"),
    ("partition", "sampling"),
    ("processes",),
    ("config", "quality"),
    ("preparation",),
    ("runtime",),
    ("spread", "generation"),
    ("denoiser", "ops"),
    ("integrations",),
    ("tools", "demo"),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
#: What knows less than its place allows: it may import these of ours, besides ``errors``.
KNOWS_ONLY = {
    "schedule": {"schedule"},
    "graph": {"graph", "progress", "memory", "turns"},
    "sampling": {"sampling", "schedule"},
    "microbatches": {"microbatches", "graph"},
    "sequence": {"sequence", "graph"},
    "processes": {"processes", "graph", "partition", "memory", "progress", "environment"},
    "preparation": {
        *("preparation", "graph", "partition", "phases", "progress", "environment", "turns"),
    },
    "demo": {"demo"},
}
#: Other people's packages that only some of ours know.
GUESTS = {
    "torch": [
        *(
            "graph",
            "partition",
            "sampling",
            "microbatches",
            "sequence",
            "memory",
            "processes",
            "config",
            "preparation",
            "runtime",
            "generation",
        ),
        *("spread", "denoiser", "ops", "integrations", "tools", "demo", "cli"),
    ],
    "asyncdiff_core": ["errors", "deadline", "processes", "runtime", "ops", "tools"],
    "asyncdiff_bench": ["cli"],
    "diffusers": ["demo", "cli"],  # integrations/ works on what it is given
    "matplotlib": ["schedule", "tools"],
    "rich": ["progress", "cli"],
    "typer": ["cli"],
}
MODULES_OF_A_PACKAGE = 15
LINES = 400


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _modules() -> dict[str, Path]:
    return {_name(p): p for p in sorted(PACKAGE.rglob("*.py"))}


def _imports(path: Path) -> Iterator[str]:
    """The full names that a module imports, of others too."""
    package = _name(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                yield whole if whole in _modules() else ".".join(base)


@cache
def _graph() -> dict[str, set[str]]:
    """Which of our modules each of them imports."""
    return {
        name: {other for other in _imports(path) if other in _modules()} - {name}
        for name, path in _modules().items()
    }


def _unit(module: str) -> str:
    """The package, or the module at the top, that a module is in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _between_units() -> Iterator[tuple[str, str]]:
    for module, others in _graph().items():
        yield from ((module, o) for o in others if _unit(o) != _unit(module))


def test_every_package_has_its_place() -> None:
    placed = [unit for layer in LAYERS for unit in layer]
    assert len(placed) == len(set(placed))
    assert {_unit(m) for m in _modules()} <= set(placed)


def test_imports_go_down() -> None:
    height = {unit: i for i, layer in enumerate(LAYERS) for unit in layer}
    up = [f"{a} imports {b}" for a, b in _between_units() if height[_unit(a)] <= height[_unit(b)]]
    assert not up, "\n".join(up)


@pytest.mark.parametrize("unit", KNOWS_ONLY)
def test_some_know_less(unit: str) -> None:
    allowed = KNOWS_ONLY[unit] | {"errors"}
    more = [f"{a} imports {b}" for a, b in _between_units() if _unit(a) == unit]
    more = [line for line in more if _unit(line.split(" imports ")[1]) not in allowed]
    assert not more, "\n".join(more)


def test_what_moves_knows_nothing_of_ranks() -> None:
    """Channels' ends are given to ranks by who makes both: ``runtime/channels.py``."""
    exchange = "asyncdiff.runtime.exchange"
    mine = {name: others for name, others in _graph().items() if name.startswith(exchange)}
    allowed = {f"asyncdiff.runtime.{name}" for name in ("cuda_graphs", "devices", "step")}
    more = [
        f"{name} imports {other}"
        for name, others in mine.items()
        for other in others
        if other.startswith("asyncdiff.runtime.") and not other.startswith(exchange)
        if other not in allowed
    ]
    assert mine and not more, "\n".join(more)


@pytest.mark.parametrize("guest", GUESTS)
def test_other_packages_are_known_where_they_belong(guest: str) -> None:
    known = [
        f"{name} imports {guest}"
        for name, path in _modules().items()
        if _unit(name) not in GUESTS[guest]
        and any(other.split(".")[0] == guest for other in _imports(path))
    ]
    assert not known, "\n".join(known)


def test_the_page_names_what_there_is() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    files = [
        *(str(p) for p in ROOT.glob("python/asyncdiff/**/*") if p.is_file()),
        *(str(p) for folder in ("benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")),
    ]
    named = re.findall(r"`([\w/]+\.py)`", page)
    gone = [name for name in named if not any(f.endswith("/" + name) for f in files)]
    assert len(named) > 50 and not gone
    # Of the way of a call: what is called, and by whom it is defined.
    way = page[page.index("## A call's way through the parts") : page.index("## Capture and")]
    classes: dict[str, set[str]] = {}
    for path in _modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                own = {x.name for x in node.body if isinstance(x, ast.FunctionDef)}
                classes.setdefault(node.name, set()).update(own)
    steps = re.findall(r"^ *([A-Z]\w+)\.(\w+)", way, re.MULTILINE)
    assert len(steps) > 8 and not [(c, m) for c, m in steps if m not in classes.get(c, ())]


def test_nothing_goes_in_a_circle() -> None:
    graph = _graph()
    left = dict(graph)
    while True:  # take away what imports nothing that is left
        ends = [m for m, others in left.items() if not others & left.keys()]
        if not ends:
            break
        for module in ends:
            del left[module]
    # And what is only on the way to a circle.
    while on_the_way := left.keys() - set().union(*left.values()):
        left = {m: others for m, others in left.items() if m not in on_the_way}
    lines = [f"{m} imports {', '.join(sorted(o & left.keys()))}" for m, o in left.items()]
    assert not left, "\n".join(lines)


def test_the_core_knows_nothing_of_diffusion() -> None:
    for path in sorted((ROOT / "asyncdiff_core").glob("*.py")):
        text = path.read_text()
        # Who has a group of torch.distributed has imported torch already.
        indent = "" if path.name == "process_group.py" else r"\s*"
        ours = rf"^{indent}(from|import) (asyncdiff|torch|diffusers)\b"
        assert not re.search(ours, text, re.MULTILINE), path
    for path in _sources():
        assert not re.search(r"#include *[<\"](torch|ATen|c10)/", path.read_text()), path


# ---- sizes ---------------------------------------------------------------------------------------


def test_packages_are_small() -> None:
    for folder in {p.parent for p in _modules().values()}:
        modules = [p.name for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(modules) <= MODULES_OF_A_PACKAGE, f"{folder}: {', '.join(sorted(modules))}"


def test_files_are_small() -> None:
    files = [*_modules().values(), *_sources()]
    lines = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in files}
    large = [f"{path}: {n} lines" for path, n in lines.items() if n > LINES]
    assert not large, "\n".join(large)


# ---- C++ -----------------------------------------------------------------------------------------

_SUFFIXES = {".hpp", ".cpp", ".cu", ".cuh", ".in"}
#: Public headers that only CUDA code can use.
_CUDA_HEADERS = {
    f"asyncdiff/{name}.hpp"
    for name in ("cuda_fabric", "cuda_graph", "channel_device", "channel_kernel", "ptx")
}


@cache
def _sources() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*") if p.suffix in _SUFFIXES)


def _includes(path: Path) -> list[str]:
    return re.findall(r"^ *# *include *[<\"]([^>\"]+)[>\"]", path.read_text(), re.M)


def _folder_of(include: str, source: Path) -> str:
    """The folder of csrc that a file is in which ``source`` includes; empty: not ours."""
    if include.startswith("asyncdiff/"):
        return "include"
    own = (source.parent / include).resolve()
    for path in (own, *(CSRC / folder / include for folder in ("src", "cuda", "bindings"))):
        if path.is_file() and CSRC in path.parents:
            return path.relative_to(CSRC).parts[0]
    return ""


#: What files of a folder may include.
MAY_INCLUDE = {
    "include": {"include"},
    "src": {"include", "src"},
    "cuda": {"include", "src", "cuda"},
    "bindings": {"include", "src", "bindings"},
    "tests": {"include", "src", "cuda", "tests"},
}


def test_includes_go_down() -> None:
    wrong = []
    for path in _sources():
        folder = path.relative_to(CSRC).parts[0]
        if folder in MAY_INCLUDE:
            wrong += [
                f"{path.relative_to(ROOT)} includes {include}"
                for include in _includes(path)
                if _folder_of(include, path) not in MAY_INCLUDE[folder] | {""}
            ]
    assert not wrong, "\n".join(wrong)


def test_the_host_knows_no_cuda() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} includes {include}"
        for path in _sources()
        if path.parent == CSRC / "src"
        for include in _includes(path)
        if include in _CUDA_HEADERS or include.startswith("cuda")
    ]
    assert not wrong, "\n".join(wrong)


def test_only_bindings_know_python() -> None:
    for path in _sources():
        if path.parent != CSRC / "bindings":
            python = [i for i in _includes(path) if i.startswith(("pybind11", "Python.h"))]
            assert not python, f"{path}: {python}"


def test_headers_include_what_they_use_without_a_circle() -> None:
    headers = {p: _includes(p) for p in _sources() if p.suffix in (".hpp", ".cuh")}

    def reach(path: Path, seen: tuple[Path, ...]) -> None:
        assert path not in seen, " -> ".join(p.name for p in (*seen, path))
        for include in headers.get(path, ()):
            for base in (path.parent, CSRC / "include", CSRC / "src", CSRC / "cuda"):
                if (base / include).is_file():
                    reach(base / include, (*seen, path))
                    break

    for path in headers:
        reach(path, ())


def test_the_test_sees_lazy_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside of functions, and for type checkers only."""
    package = tmp_path / "asyncdiff"
    (package / "low").mkdir(parents=True)
    for name in ("__init__", "high", "low/__init__"):
        (package / f"{name}.py").write_text("")
    (package / "low" / "a.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..high import x\n"
        "def f():\n    from .. import high\n    import asyncdiff.low\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", package)
    _modules.cache_clear()
    try:
        found = sorted(_imports(package / "low" / "a.py"))
    finally:
        monkeypatch.undo()
        _modules.cache_clear()
    assert found == ["asyncdiff.high", "asyncdiff.high", "asyncdiff.low", "typing"]
