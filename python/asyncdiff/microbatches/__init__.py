"""A batch in parts that are computed at different times, for pipelines that know one batch only."""

from . import rules
from .tensor import Layout, MicroBatched, in_this_mode, on_stream, whole

__all__ = ["Layout", "MicroBatched", "in_this_mode", "on_stream", "rules", "whole"]
