"""The pages of the C++ headers, made by docs/site/cpp_api.py; `make docs` builds all of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "csrc" / "include"
sys.path.insert(0, str(ROOT / "docs" / "site"))

import cpp_api  # noqa: E402

SMALL = """\
// What this header is about.
//
//   code(1);
#pragma once

#include <vector>

namespace asyncdiff {

// A number.
#define THING_MAJOR @MAJOR@

// A thing. Throws Error.
class ASYNCDIFF_EXPORT Thing final {
 public:
  explicit Thing(int size);
  Thing(const Thing&) = delete;
  int size() const { return size_; }
  // Grows it.
  void grow(int by,
            int at = 0);

 private:
  // not shown
  int size_;
};

// Plain data.
struct Point {
  int x;  // to the right
};

// A function with a body.
inline int twice(int n) {
  // how, not what
  return 2 * n;
}

}  // namespace asyncdiff
"""


def test_a_header_as_a_page(tmp_path: Path) -> None:
    (tmp_path / "thing.hpp").write_text(SMALL)
    text = cpp_api.page(tmp_path / "thing.hpp", tmp_path)
    assert text.startswith("# thing.hpp\n") and "What this header is about." in text
    assert "```cpp\ncode(1);\n```" in text and "#include <thing.hpp>" in text
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == [
        "THING_MAJOR",
        "Thing",
        "Point",
        "twice",
    ]
    assert "```cpp\n#define THING_MAJOR\n```\n\nA number." in text
    assert "class Thing final;" in text and "A thing. Throws Error." in text
    assert "explicit Thing(int size);\nint size() const;" in text  # no body, nothing deleted
    assert "void grow(int by,\n          int at = 0);\n```\n\nGrows it." in text
    assert "int x;  // to the right" in text
    assert "inline int twice(int n);\n```\n\nA function with a body.\n" in text
    assert "size_" not in text and "not what" not in text and "not shown" not in text


@pytest.mark.parametrize("header", sorted(HEADERS.rglob("*.hpp*")), ids=lambda p: p.stem)
def test_every_header_makes_a_page(header: Path) -> None:
    text = cpp_api.page(header, HEADERS)
    assert text.count("```") % 2 == 0
    about, entities = cpp_api.parse(header.read_text())
    assert about and entities
