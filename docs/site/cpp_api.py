"""Pages of the C++ headers: a header's own comments and declarations, in Markdown.

Not a C++ parser: it reads headers that are laid out as ours are by clang-format, with ``//``
comments above what they are about, or behind it on the same line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_CLASS = re.compile(r"^(?:template <[^>]*>\s*)?(?:class|struct)\s+(?:alignas\(\w+\)\s+)?(\w+)")
_ENUM = re.compile(r"^enum class (\w+)")
_ALIAS = re.compile(r"^using (\w+) =")
_MACRO = re.compile(r"^#define (\w+)")
_CONSTANT = re.compile(r"^(?:static )?constexpr .*\b(\w+) =")
_FUNCTION = re.compile(r"([\w~]+|operator\S+)\s*\(")


@dataclass
class Entity:
    """A declaration and what the header says of it. Classes have members."""

    comment: str
    code: str
    members: list[Entity] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What is declared; empty where there is no name that a reader would look for."""
        for pattern in (_CLASS, _ENUM, _ALIAS, _CONSTANT, _MACRO):
            if found := pattern.match(self.code):
                return found.group(1)
        found = _FUNCTION.search(self.code)
        return found.group(1) if found else ""


def page(header: Path, root: Path) -> str:
    """The Markdown page of a header, or of one that the build makes (``.hpp.in``); ``root`` is the
    folder that ``#include`` begins at."""
    about, entities = parse(header.read_text())
    included = str(header.relative_to(root)).removesuffix(".in")
    name = header.name.removesuffix(".in")
    out = [f"# {name}\n", _prose(about), f"```cpp\n#include <{included}>\n```"]
    for entity in entities:
        out.append(f"\n## {entity.name or 'Declarations'}\n\n" + _shown(entity))
        for member in entity.members:
            out.append(_shown(member))
    return "\n\n".join(part for part in out if part) + "\n"


def _shown(entity: Entity) -> str:
    return f"```cpp\n{entity.code}\n```\n\n{_prose(entity.comment)}".rstrip()


def _prose(comment: str) -> str:
    """A comment as Markdown: indented lines are code."""
    out: list[str] = []
    code = False
    for line in comment.splitlines():
        if (line.startswith("  ") and line.strip()) and not code:
            out += ["", "```cpp"]
            code = True
        elif code and line.strip() and not line.startswith("  "):
            out += ["```", ""]
            code = False
        out.append(line.replace("<", "&lt;") if not code else line[2:])
    return "\n".join([*out, "```"] if code else out).strip()


def parse(text: str) -> tuple[str, list[Entity]]:
    """The comment at the head of a header, and what its namespace declares."""
    head = re.match(r"(?://.*\n)+", text)
    about = _uncomment(head.group(0)) if head else ""
    # Who reads a declaration does not care what the linker sees.
    rest = re.sub(r"(?<!#define )ASYNCDIFF_EXPORT ", "", text[head.end() if head else 0 :])
    lines = rest.splitlines()
    return about, [e for e in _entities(lines) if not e.code.startswith("namespace std")]


def _entities(lines: list[str]) -> Iterator[Entity]:
    comment: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at].strip()
        if line.startswith("//"):
            comment.append(line)
            at += 1
        elif _MACRO.match(line):
            yield Entity(_uncomment(comment), _macro(line))
            comment = []
            at += 1
            while lines[at - 1].endswith("\\"):
                at += 1
        elif not line or line.startswith(("#", "}")) or re.match(r"namespace [\w:]+ \{$", line):
            comment = []
            at += 1
        else:
            statement, at = _statement(lines, at)
            # A comment with a dash is the heading of a part of the header.
            told = "" if comment and comment[0].startswith("// ---") else _uncomment(comment)
            yield _entity(told, statement)
            comment = []


def _macro(line: str) -> str:
    """A macro without a value that goes on, or that the build puts in."""
    name = _MACRO.match(line)
    assert name is not None
    return name[0] if "@" in line or line.endswith("\\") else line


def _statement(lines: list[str], at: int) -> tuple[list[str], int]:
    """The lines of the declaration that begins here, up to its semicolon or closing brace."""
    depth, begun = 0, at
    while at < len(lines):
        code = lines[at].split("//")[0]
        depth += sum(code.count(c) for c in "({") - sum(code.count(c) for c in ")}")
        at += 1
        if depth == 0 and code.rstrip().endswith((";", "}", ":")):
            break
    return lines[begun:at], at


def _entity(comment: str, lines: list[str]) -> Entity:
    first = lines[0].strip()
    is_class = _CLASS.match(first) and len(lines) > 1
    if is_class and not first.endswith(";"):
        opening = _opening(lines)
        head = " ".join(line.strip() for line in lines[: opening + 1]).rstrip("{ ") + ";"
        body = _public(lines[opening + 1 : -1], first)
        members = [e for e in _entities(body) if "= delete" not in e.code]
        if any("(" in member.code for member in members):
            return Entity(comment, head, _grouped(members))
        return Entity(comment, "\n".join(_dedent(lines)))  # data: as it stands
    code = "\n".join(line.split("//")[0].rstrip() for line in _dedent(lines))
    if _ENUM.match(first):
        return Entity(comment, code)
    shown = _declaration(code)
    if shown == code:  # no body, whose comments are not for readers of a declaration
        behind = [line.split("//", 1)[1].strip() for line in lines if "//" in line]
        comment = " ".join(filter(None, [comment, *behind]))
    return Entity(comment, shown)


def _opening(lines: list[str]) -> int:
    return next(i for i, line in enumerate(lines) if "{" in line.split("//")[0])


def _public(lines: list[str], first: str) -> list[str]:
    """What a class shows: a class is private at first, a struct is public."""
    shown, out = not first.startswith("class"), []
    for line in lines:
        access = re.match(r"\s*(public|protected|private):$", line)
        if access:
            shown = access.group(1) == "public"
        elif shown:
            out.append(line)
    return out


def _grouped(members: list[Entity]) -> list[Entity]:
    """Members that need no words of their own follow the one before them in one block."""
    out: list[Entity] = []
    for member in members:
        if out and not member.comment and not out[-1].comment:
            out[-1].code += "\n" + member.code
        else:
            out.append(member)
    return out


def _declaration(code: str) -> str:
    """A function without its body."""
    depth = 0
    for at, char in enumerate(code):
        depth += (char == "(") - (char == ")")
        if char == "{" and depth == 0 and ")" in code[:at]:
            return code[:at].rstrip() + ";"
    return code


def _dedent(lines: list[str]) -> list[str]:
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return [line[margin:] for line in lines]


def _uncomment(lines: str | list[str]) -> str:
    split = lines.splitlines() if isinstance(lines, str) else lines
    return "\n".join(re.sub(r"^\s*// ?", "", line) for line in split)
