"""What the site shows besides the pages in docs/: the README as its first page, what pages link to
elsewhere in the repository, and the C++ headers."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import cpp_api

ROOT = Path(__file__).resolve().parents[2]
HEADERS = ROOT / "csrc" / "include"
#: Pages made of files outside docs/.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def on_config(config: Any) -> Any:
    """Puts the headers' pages into the menu."""
    reference = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    menu = next(e for e in reference if isinstance(e, dict) and "C++" in e)
    menu["C++"] = [_page_of(header) for header in _headers()]
    return config


def _headers() -> list[Path]:
    return sorted([*HEADERS.rglob("*.hpp"), *HEADERS.rglob("*.hpp.in")])


def _page_of(header: Path) -> str:
    return f"reference/cpp/{header.name.split('.')[0]}.md"


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made here, and the files that pages link to."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=_linked(text, "", page, files, config)))
    for header in _headers():
        content = cpp_api.page(header, HEADERS)
        files.append(File.generated(config, _page_of(header), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lets links out of docs/ lead to the site's copy of what they name."""
    if page.file.generated_by:
        return markdown
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    return _linked(markdown, folder, page.file.src_uri, files, config)


def _linked(text: str, folder: str, page: str, files: Files, config: Any) -> str:
    """The text with its relative links, written in ``folder`` of the repository, as the site's."""

    def there(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        if target in PAGES:
            target = PAGES[target]
        elif target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif (ROOT / target).is_file():
            name = f"files/{target}" + (".txt" if target.endswith(".md") else "")
            if files.get_file_from_path(name) is None:
                copy = File.generated(config, name, abs_src_path=str(ROOT / target))
                files.append(copy)
            target = name
        else:
            return match[0]  # the site's own check says what is wrong
        return match[1] + posixpath.relpath(target, posixpath.dirname(page) or ".") + match[3]

    return _LINK.sub(there, text)
