"""What came of each pipeline of diffusers, as a table."""

from __future__ import annotations

from collections import Counter
from typing import Any

from markdown_table import markdown

#: Largest difference over the largest value that counts as none.
_NONE = 1e-5


def table(document: dict[str, Any]) -> str:
    """How many are exact, refused, wrong or not built, and a row for each that was built."""
    e, all_rows = document["environment"], document["figures"]
    built = [r for r in all_rows if "pipeline" in r and "not built" not in r]
    kinds = Counter(_kind(r) for r in built)
    names = Counter(r["pipeline"] for r in built)
    rows = [["pipeline", "calls a step", "every step exact", "all but the first asynchronous"]]
    for r in sorted(built, key=lambda r: (r["pipeline"], r["module"])):
        name = r["pipeline"].removesuffix("Pipeline")
        if names[r["pipeline"]] > 1:
            name += f" ({r['module'].rsplit('.', 1)[1].removeprefix('test_')})"
        rows.append([name, *_cells(r)])
    return (
        f"diffusers {e['diffusers']}, torch {e['torch']}, commit {e['commit']}. Of {len(built)} "
        f"pipelines that can be built without downloads {kinds['exact']} are exact, "
        f"{kinds['refused']} are refused, {kinds['wrong']} are wrong; "
        f"{len(all_rows) - len(built)} could not be built or did not run by themselves.\n\n"
        + markdown(rows)
    )


def _kind(row: dict[str, Any]) -> str:
    if "exact refused" in row or "asynchronous refused" in row or "failed" in row:
        return "refused"
    near = row["exact"] is not None and row["exact"] < _NONE and row["restored"] == 0
    return "exact" if near else "wrong"


def _cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return ["", row["failed"], ""]
    if "exact refused" in row:
        return ["", f"refused: {_short(row['exact refused']['why'])}", ""]
    exact = "yes" if _kind(row) == "exact" else f"{row['exact']:.0e}"
    later = row.get("asynchronous")
    told = "refused" if later is None else f"{later:.2g}"
    return [str(row["branches"]), exact, told]


def _short(why: str) -> str:
    """The first sentence of a message, without the error's name, as a cell of a table."""
    text = why.partition(": ")[2].rpartition(" [")[0]
    return text.split(". ")[0].replace("|", "/").replace("<", "‹").replace(">", "›")[:140]
