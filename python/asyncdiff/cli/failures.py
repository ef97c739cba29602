"""Which exceptions are the user's to mend, and what to tell them."""

from __future__ import annotations

from ..errors import AsyncDiffError

#: optional module -> the extra that brings it
EXTRAS = {
    "accelerate": "diffusers",
    "diffusers": "diffusers",
    "matplotlib": "demo",
    "numpy": "demo",
    "PIL": "demo",
    "rich": "demo",
    "safetensors": "diffusers",
    "skimage": "demo",
    "torch": "demo",
    "transformers": "diffusers",
    "typer": "demo",
}


def explain(error: BaseException) -> str | None:
    """One line for the user, or None where the exception is a fault of asyncdiff itself."""
    if isinstance(error, AsyncDiffError) or _of_core(error):
        return " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module == "asyncdiff_core":
            return "the core extension is not built: run `make demo`, or `pip install .`"
        if module == "asyncdiff_bench":
            return (
                "the exchange benchmark (asyncdiff_bench) is not installed: install asyncdiff "
                "again, with `pip install .`, or `make env` in a checkout"
            )
        if module in EXTRAS:
            return f"{module} is not installed: pip install 'asyncdiff[{EXTRAS[module]}]'"
    return None


def _of_core(error: BaseException) -> bool:
    """An error that the core raises on purpose. By name: the core may not be importable here."""
    return any(
        kind.__module__.partition(".")[0] == "asyncdiff_core" for kind in type(error).__mro__
    )
