"""The build backend: scikit-build-core's, with a CUDA compiler from PyPI where that is wanted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pypi_cuda
from scikit_build_core.setuptools import build_meta
from scikit_build_core.setuptools.build_meta import (  # the hooks that stay as they are
    build_sdist,
    get_requires_for_build_sdist,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _with_requirements(hook: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def get_requires(config_settings: Any = None) -> list[str]:
        return [*hook(config_settings), *pypi_cuda.requirements()]

    return get_requires


def _with_compiler(hook: Callable[..., str]) -> Callable[..., str]:
    def build(*args: Any, **kwargs: Any) -> str:
        # Each hook is called in a process of its own.
        os.environ.update(pypi_cuda.environment())
        return hook(*args, **kwargs)

    return build


get_requires_for_build_wheel = _with_requirements(build_meta.get_requires_for_build_wheel)
get_requires_for_build_editable = _with_requirements(build_meta.get_requires_for_build_editable)
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_wheel = _with_compiler(build_meta.build_wheel)
build_editable = _with_compiler(build_meta.build_editable)
