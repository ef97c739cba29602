"""Tables in Markdown."""

from __future__ import annotations


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the first of them the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
