"""What the benchmark raises on purpose."""

from __future__ import annotations

from asyncdiff.errors import AsyncDiffError


class BenchError(AsyncDiffError, ValueError):
    """A benchmark was asked for what does not exist, or measured what cannot be right."""
