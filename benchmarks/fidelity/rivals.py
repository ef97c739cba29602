"""Which of our rows a compared method beats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

#: Names of our own rows begin so; all others are what they are compared with.
OURS = ("asyncdiff", "wavefront", "quality")

Row = Mapping[str, Any]


def rival(row: Row, rows: Sequence[Row]) -> Row | None:
    """The compared method that is closest to the plain pictures of those at least as fast as our
    ``row`` on no more devices, if it is closer than ours; None of a row that is not ours."""
    if not row["method"].startswith(OURS):
        return None
    better = [
        o
        for o in rows
        if not o["method"].startswith(OURS)
        and o["devices"] <= row["devices"]
        and o["speedup"] >= row["speedup"]
        and o["psnr_db"] > row["psnr_db"]
    ]
    return max(better, key=lambda o: float(o["psnr_db"]), default=None)


def beaten(rows: Sequence[Row]) -> Iterator[str]:
    """One line for each of our rows that is beaten."""
    for row in rows:
        best = rival(row, rows)
        if best is not None:
            yield (
                f"{row['sampler']}: {row['method']} ({row['speedup']:.2f}x, "
                f"{row['psnr_db']:.1f} dB) is beaten by {best['method']} "
                f"({best['speedup']:.2f}x, {best['psnr_db']:.1f} dB)"
            )
