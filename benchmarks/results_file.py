"""Where results go, and what is written beside them: hardware, versions, command, time."""

from __future__ import annotations

from pathlib import Path

from asyncdiff.bench.results import environment, write

__all__ = ["ROOT", "environment", "write"]

ROOT = Path(__file__).resolve().parents[1]
