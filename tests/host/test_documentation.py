"""What the documentation promises: its links lead somewhere, its messages are those of the code."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import asyncdiff
import asyncdiff_core
from asyncdiff import errors
from asyncdiff_bench import errors as bench_errors

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md", "tests/data/**/*.md")
    for path in ROOT.glob(pattern)
)
TROUBLE = ROOT / "docs" / "guide" / "troubleshooting.md"
#: Errors that say so of code which users do not call, or pass on another error's words.
_UNQUOTED = {"BenchError", "AttributeError", "ValueError", "TypeError"}
_HOLE = "\0"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in _anchors(found), target


def test_pages_that_the_code_names_exist() -> None:
    for folder in ("python", "asyncdiff_core", "csrc", "benchmarks", "examples", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".hpp", ".cpp", ".cu", ".cuh") or folder == ".ci":
                for name in re.findall(r"\bdocs/[\w/]+\.md", path.read_text()):
                    assert (ROOT / name).exists(), f"{path.relative_to(ROOT)} names {name}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("package", [asyncdiff, asyncdiff_core], ids=lambda p: p.__name__)
def test_what_is_public_is_documented(package: Any) -> None:
    for name in package.__all__:
        public = getattr(package, name)
        assert inspect.getdoc(public), f"{package.__name__}.{name} has no docstring"
        # The extension's classes have theirs in its stub.
        if inspect.isclass(public) and not public.__module__.endswith("_core"):
            for part, thing in vars(public).items():
                if not part.startswith("_") and (callable(thing) or isinstance(thing, property)):
                    said = inspect.getdoc(getattr(public, part))
                    assert said, f"{package.__name__}.{name}.{part} has no docstring"


# ---- troubleshooting -----------------------------------------------------------------------------


@cache
def _raised() -> list[tuple[str, str]]:
    """Every error that asyncdiff raises: its class, and its message with holes for values."""
    out = []
    kinds = vars(errors) | vars(bench_errors)
    sources = (ROOT / "python" / "asyncdiff", ROOT / "benchmarks" / "exchange" / "asyncdiff_bench")
    for path in sorted(path for source in sources for path in source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                name = node.func.id
                if name in kinds:
                    out += [(name, text) for text in map(_template, node.args) if text]
    return out


def _template(node: ast.expr) -> str:
    """A string expression's text, a hole for each value; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) if isinstance(part, ast.Constant) else _HOLE
                       for part in node.values)  # fmt: skip
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + (_template(node.right) or _HOLE)
    if isinstance(node, ast.IfExp):
        return _template(node.body) + _HOLE + _template(node.orelse)
    return ""


@cache
def _quoted() -> list[str]:
    """The messages that the page quotes: the first cell of a row that is a piece of code."""
    return re.findall(r"^\| `([^`]+)` \| [^|]* \|$", TROUBLE.read_text(), flags=re.MULTILINE)


def _says(quote: str, text: str) -> bool:
    """Whether the quoted pieces, between the marks of omission, come in order in the message."""
    at = 0
    for piece in filter(None, (piece.strip() for piece in quote.split("…"))):
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


@pytest.mark.parametrize("quote", _quoted())
def test_what_is_quoted_is_said(quote: str) -> None:
    assert any(_says(quote, text) for _, text in _raised()), "no error says this any more"


def test_every_kind_of_error_is_explained() -> None:
    page = TROUBLE.read_text()
    for name, kind in (vars(errors) | vars(bench_errors) | vars(asyncdiff_core)).items():
        if isinstance(kind, type) and issubclass(kind, Exception):
            assert re.search(rf"^#+ .*\b{name}\b|`[\w.]*\b{name}`", page, flags=re.MULTILINE), name


def unexplained() -> list[str]:
    """Messages that a user can meet and the page does not quote."""
    return [
        f"{name}: {text.replace(_HOLE, '…')}"
        for name, text in _raised()
        if name not in _UNQUOTED and not any(_says(quote, text) for quote in _quoted())
    ]


def test_every_message_is_explained() -> None:
    missing = unexplained()
    assert not missing, "docs/guide/troubleshooting.md lacks:\n" + "\n".join(missing)
