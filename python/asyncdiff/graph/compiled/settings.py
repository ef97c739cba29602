"""What code depends on besides a piece: settings of torch, here and in other processes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

#: Settings that code depends on, and inductor's cache goes by: how each is read and set.
_SETTINGS: dict[str, tuple[Any, Any]] = {
    "deterministic": (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda x: torch.use_deterministic_algorithms(x[0], warn_only=x[1]),
    ),
    "fill": (
        lambda: torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        lambda x: setattr(torch.utils.deterministic, "fill_uninitialized_memory", x),
    ),
    "precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "fp32": (  # says more than "precision", where torch has it
        lambda: getattr(torch.backends.cuda.matmul, "fp32_precision", None),
        lambda x: setattr(torch.backends.cuda.matmul, "fp32_precision", x),
    ),
    "fp16": (
        lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        lambda x: setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", x),
    ),
    "bf16": (
        lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        lambda x: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", x),
    ),
    "dtype": (torch.get_default_dtype, torch.set_default_dtype),
    # Loops on CPUs are written for so many threads.
    "threads": (torch.get_num_threads, torch.set_num_threads),
}


def in_key() -> Any:
    """What tells code apart in this process, besides what it is for."""
    from torch._inductor import config

    return (
        config.get_hash(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


def kept() -> bool:
    """Whether inductor keeps what it compiles on the disk, where other processes find it."""
    from torch._inductor import config

    return bool(config.fx_graph_cache and not config.force_disable_caches)


@contextlib.contextmanager
def of_architecture(device: torch.device) -> Iterator[None]:
    """Have inductor's cache tell code for this GPU from that for others of other architectures: it
    goes by what the process's current GPU was called when the first piece was compiled, which may
    be another one."""
    if device.type != "cuda":
        yield
        return
    from torch._inductor import config

    _name_the_first()
    mine, first = (torch.cuda.get_device_capability(d) for d in (device, 0))
    if mine == first:
        yield
        return
    with config.patch({"cuda.arch": "".join(map(str, mine))}):
        yield


@functools.cache
def _name_the_first() -> None:
    """What inductor takes for this machine's GPU is the first one, as in other processes."""
    from torch._inductor.codecache import CacheBase

    with torch.cuda.device(0):
        CacheBase.get_system()


def here() -> dict[str, Any]:
    """The settings of this process, as :func:`take` takes them."""
    from torch._inductor import config

    ours = {name: read() for name, (read, _) in _SETTINGS.items()}
    return {"inductor": config.save_config_portable(), **ours}


def take(settings: dict[str, Any]) -> None:
    """Have the settings of another process in this one. What cannot be set is left: inductor's
    cache then goes by other words, and serves nobody."""
    from torch._inductor import config

    for name, (read, write) in _SETTINGS.items():
        if read() != settings[name]:
            write(settings[name])
    config.load_config(settings["inductor"])  # in which some of the others may show
