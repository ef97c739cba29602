"""Slow tests in the time that is left: their order, and what is said of those that are not run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TESTS = "".join(f"def test_{n}(): pass\n" for n in "abcd")


def run(folder: Path, *options: str) -> str:
    (folder / "test_four.py").write_text(TESTS)
    done = subprocess.run(
        [*(sys.executable, "-m", "pytest", "-p", "until", "-p", "no:cacheprovider"), *options],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        # Other plugins take five times as long as all of this.
        env=os.environ
        | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_word_begins_at_one_and_runs_all(tmp_path: Path) -> None:
    firsts = set()
    for word in ("a", "b", "c", "e", "f", "g"):
        said = run(tmp_path, "-v", "--start-at", word).splitlines()
        order = "".join(x.split("::test_")[1][0] for x in said if "::test_" in x)
        assert order in "abcdabc" and len(order) == 4
        firsts.add(order[0])
    assert len(firsts) > 1


def test_what_is_not_reached_is_listed(tmp_path: Path) -> None:
    assert "not run" not in run(tmp_path, "--until", str(time.time() + 60))
    said = run(tmp_path, "--until", str(time.time() - 1))
    assert "4 skipped" in said and "not run: no time left: 4 tests" in said
    assert "test_four.py::test_c" in said.splitlines()
