"""The nodes: each takes a MODEL, returns one whose denoiser runs split over several devices."""

from __future__ import annotations

from typing import Any

_MISSING = (
    "AsyncDiff parallel needs the Python package asyncdiff, in the Python that runs ComfyUI ({}): "
    "see the README in this node's folder"
)


_DEVICES = ("STRING", {"default": "", "tooltip": 'Such as "cuda:0, cuda:1"; empty: all GPUs.'})
#: Inputs that both nodes have.
_OPTIONAL: dict[str, Any] = {
    "compile": (
        ["auto", "off", "on"],
        {"tooltip": "auto: large denoisers on GPUs, which takes a minute once."},
    ),
    "compress": (
        ["off", "auto", "fp8", "int8"],
        {
            "tooltip": "What crosses between devices, over slow links: a byte a value; "
            "auto: fp8 where links would be waited for.",
        },
    ),
}


class _Spreads:
    """What ComfyUI asks of either node."""

    CATEGORY = "advanced/model"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "spread"


class AsyncDiffByQuality(_Spreads):
    """A MODEL whose denoiser is split as a quality says, chosen anew for each run."""

    DESCRIPTION = (
        "Runs the model's denoiser split over several GPUs, as is fastest for each picture. Put it "
        "right behind the loader, before LoRAs, so that what is prepared is kept when they change."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs that ComfyUI draws, with defaults and what its tooltips say."""
        return {
            "required": {
                "model": ("MODEL",),
                "quality": (
                    ["balanced", "high", "exact", "fast"],
                    {
                        "tooltip": "How close to one GPU's picture it stays. exact: the same. "
                        "ComfyUI's log says what is picked, and why.",
                    },
                ),
                "devices": _DEVICES,
            },
            "optional": _OPTIONAL,
        }

    def spread(self, model: Any, quality: str = "balanced", **settings: Any) -> tuple[Any]:
        """A clone of the MODEL that runs split so. Raises InputError or DeviceError, each saying
        what to change, RuntimeError where asyncdiff is not installed."""
        _check_installed()
        from .patcher import check_model, spread_over
        from .settings import by_quality
        from .words import own_words

        with own_words():
            check_model(model)
            return (spread_over(model, by_quality(quality, **settings)),)


class AsyncDiffParallel(_Spreads):
    """A MODEL whose denoiser is split over devices with settings that are given by hand."""

    DESCRIPTION = (
        "Runs the model's denoiser split over several GPUs. Put it right behind the loader, before "
        "LoRAs, so that what is prepared is kept when they change."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs that ComfyUI draws, with defaults, bounds and what its tooltips say."""
        return {
            "required": {
                "model": ("MODEL",),
                "devices": _DEVICES,
                "components": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 16,
                        "tooltip": "Parts that the denoiser is cut into; 0: one a device.",
                    },
                ),
                "schedule": (
                    ["wavefront", "asyncdiff", "sequence"],
                    {
                        "tooltip": "wavefront: closest to one GPU's picture. asyncdiff: as "
                        "published. sequence: transformers (FLUX, SD3, ...), exact.",
                    },
                ),
                "warmup": (
                    "INT",
                    {
                        "default": 6,
                        "min": 1,
                        "max": 10000,
                        "tooltip": "The first steps, run exactly. With as many as there are, the "
                        "picture is that of one GPU.",
                    },
                ),
                "exact_tail": (
                    "INT",
                    {
                        "default": 1,
                        "min": 0,
                        "max": 10000,
                        "tooltip": "The last steps, run exactly.",
                    },
                ),
                "guidance": (
                    ["batched", "split"],
                    {"tooltip": "split: half of the devices take each condition."},
                ),
            },
            "optional": {
                "exact_mode": (
                    ["chain", "split", "sequence"],
                    {
                        "tooltip": "How exact steps run: one part after another; a condition on "
                        "each of two devices; or tokens shared out (transformers).",
                    },
                ),
                **_OPTIONAL,
            },
        }

    def spread(self, model: Any, **settings: Any) -> tuple[Any]:
        """A clone of the MODEL that runs split with these settings. Raises InputError, PlanError or
        DeviceError, each saying what to change, RuntimeError where asyncdiff is not installed."""
        _check_installed()
        from .patcher import check_model, spread_over
        from .settings import Settings, check_devices, config_of
        from .words import own_words

        with own_words():
            check_model(model)
            config = config_of(**settings)
            check_devices(config)
            return (spread_over(model, Settings(config)),)


def _check_installed() -> None:
    """Raise RuntimeError where the Python that runs ComfyUI has no asyncdiff."""
    try:
        import asyncdiff  # noqa: F401
    except ImportError as e:
        raise RuntimeError(_MISSING.format(e)) from e
