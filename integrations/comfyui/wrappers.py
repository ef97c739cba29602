"""Wrappers around what ComfyUI calls: a sampler's run, each of its evaluations, each call of the
denoiser in one."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from asyncdiff.errors import CaptureError, InputError

from .host import Host, host_of
from .sampling import Sampling
from .settings import Settings
from .words import own_words

KEY = "asyncdiff"
#: What other nodes put into a model's options that works inside of its layers.
_INSIDE = (
    "patches",
    "patches_replace",
    "optimized_attention_override",
    "chroma_radiance_options",
)


def add_wrappers(patcher: Any, settings: Settings) -> None:
    """Wrap the sampler and the denoiser of a MODEL, in the place of those of an earlier node."""
    from comfy.patcher_extension import WrappersMP

    host = host_of(patcher.model)
    each = {
        WrappersMP.SAMPLER_SAMPLE: functools.partial(_sample, settings),
        WrappersMP.PREDICT_NOISE: _evaluate,
        WrappersMP.CALC_COND_BATCH: functools.partial(_conditions, host),
        WrappersMP.APPLY_MODEL: functools.partial(_apply, host),
        WrappersMP.DIFFUSION_MODEL: functools.partial(_denoise, host),
    }
    for kind, wrapper in each.items():
        patcher.remove_wrappers_with_key(kind, KEY)
        patcher.add_wrapper_with_key(kind, KEY, wrapper)


def _sample(settings: Settings, executor: Any, guider: Any, sigmas: Any, *rest: Any) -> Any:
    """A sampler's run: ``guider`` is what it evaluates, at ``sigmas`` but the last."""
    with own_words():
        return _run(settings, executor, guider, sigmas, *rest)


def _run(settings: Settings, executor: Any, guider: Any, sigmas: Any, *rest: Any) -> Any:
    patcher = guider.model_patcher
    host = host_of(patcher.model)
    if patcher.hook_patches:
        raise InputError(
            "AsyncDiff parallel: hooks (scheduled LoRAs) change weights in the middle of a run, "
            "which devices do not follow. Load LoRAs with a LoRA loader, or bypass AsyncDiff"
        )
    run = Sampling(
        *(host.denoiser(settings), host.auto),
        *(patcher.model.model_sampling, sigmas, executor.class_obj),
    )
    if guider.model_options.get("context_handler") is not None:
        run.be_exact("windows of frames move from step to step")
    before, host.run = host.run, run
    try:
        samples = executor(guider, sigmas, *rest)
        run.settle()
    finally:
        host.run = before
        run.stop()
    return samples


def _evaluate(executor: Any, x: Any, sigma: Any, *rest: Any, **options: Any) -> Any:
    """An evaluation at ``sigma``, of shape (batch,)."""
    run = host_of(executor.class_obj.inner_model).run
    if run is not None:
        run.evaluation(sigma)
    return executor(x, sigma, *rest, **options)


def _apply(host: Host, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of the model, around that of the denoiser."""
    run = host.run
    before = 0 if run is None else run.calls
    result = executor(*args, **kwargs)
    if run is not None and run.calls == before:
        raise CaptureError(
            "AsyncDiff parallel: this version of ComfyUI gives no way into the denoiser of this "
            f"model ({type(host.model).__name__}): bypass the node"
        )
    return result


def _conditions(host: Host, executor: Any, model: Any, conds: Any, *rest: Any) -> Any:
    """Some conditions of an evaluation, which go to the denoiser in one batch or in several."""
    if host.run is not None:
        host.run.conditions = sum(len(cond) for cond in conds if cond)
    return executor(model, conds, *rest)


def _denoise(host: Host, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of the denoiser."""
    arguments = _named(executor.original, args, kwargs)
    options = arguments.pop("transformer_options", None) or {}
    _check(executor, options)
    if host.run is None:
        raise InputError(
            "AsyncDiff parallel: the denoiser was called by something that is no sampler of "
            "ComfyUI, so that its steps are not known: bypass AsyncDiff for it"
        )
    given = {name: value for name, value in arguments.items() if value is not None}
    # Layers write into their options, which is nothing to be kept.
    return host.run.call(options, {**given, "transformer_options": {}})


def _named(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = _signature(getattr(function, "__func__", function))
    if hasattr(function, "__func__"):
        args = (None, *args)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    if hasattr(function, "__func__"):
        named.pop(next(iter(signature.parameters)))
    return named


@functools.cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def _check(executor: Any, options: dict[str, Any]) -> None:
    """Raise InputError for what other nodes do inside of the denoiser."""
    used = [name for name in _INSIDE if options.get(name)]
    if used:
        names = sorted(
            str(name) for x in used for name in (options[x] if isinstance(options[x], dict) else x)
        )
        raise InputError(
            "AsyncDiff parallel: another node works inside of the denoiser's layers "
            f"({', '.join(names)}: FreeU, IP-Adapter, HyperTile and their like do), and these run "
            "on other devices. Bypass that node or AsyncDiff"
        )
    if len(executor.wrappers) > executor.idx + 1:
        raise InputError(
            "AsyncDiff parallel: another node replaces the denoiser's computation (caches like "
            "TeaCache do), which AsyncDiff does itself. Bypass one of the two"
        )
